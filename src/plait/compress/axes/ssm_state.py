"""Channels of the SSM state, ranked inside their group: N is one number, but each group has its own B and C.

    output   sqrt( mean over tokens of sum over the group's heads of C_n^2 |h_n|^2 ),   h_n (P,): state channel n

A head adds C_n h_n to its output for every n. States are never formed in a scan over chunks, so |h_n|^2 is estimated:
for random signs r (P,) of each head, E (r . h_n)^2 = |h_n|^2, and r . h_n obeys the recurrence of a head of one channel
x' = r . x. That is the same operation with the roles changed, x' in place of B, B in place of x, ones in place of C:

    ssd(x = B, dt, A, B = x', C = 1)_n = sum over s <= t of decay(s..t) dt_s x'_s B_n,s = (r . h_n)_t

so that one more scan gives every token's projected states exactly. The estimate is unbiased; its error falls with
tokens and heads, and twins among state channels are not sought: C passes a convolution and cannot be added up.

Source   Dao and Gu 2024, arXiv:2405.21060 section 6 (roles of B and x in the matrix form).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.compress.axis import Axis, Edits, How, Units, best, flat
from plait.compress.dims import mamba2_rows, taking
from plait.compress.taps import Taps
from plait.model.hybrid import Block
from plait.model.layers.mamba2 import Mamba2, Mamba2Mixer
from plait.ops.conv import causal_conv1d
from plait.ops.ssd import ssd


def _watch(taps: Taps, where: str, block: Block) -> None:
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Mixer)
    s = mixer.spec
    name = f"{where}.state"

    def hook(y: Tensor) -> None:
        _, xBC, dt = y.split([s.d_inner, s.conv_dim, s.n_heads], dim=-1)
        active = causal_conv1d(xBC, mixer.conv.weight, mixer.conv.bias, starts=taps.starts)
        x, B, C = active.split([s.d_inner, s.n_groups * s.d_state, s.n_groups * s.d_state], dim=-1)
        x = x.unflatten(-1, (s.n_heads, s.head_dim))
        B, C = (t.unflatten(-1, (s.n_groups, s.d_state)) for t in (B, C))
        signs = torch.randint(2, (s.n_heads, s.head_dim), generator=taps.generator()).to(x) * 2 - 1
        probe = torch.einsum("blhp,hp->blh", x, signs)
        per = s.n_heads // s.n_groups
        # a head of every group at a time: the projected states of one head are as large as those of B and C
        for j in range(per):
            heads = slice(j, None, per)
            A, bias = -mixer.A_log.float().exp()[heads], mixer.dt_bias.float()[heads]
            one = torch.ones_like(probe[..., heads, None])
            h, _ = ssd(
                B.contiguous(),
                dt[..., heads].contiguous(),
                A.contiguous(),
                probe[..., heads, None].contiguous(),
                one,
                dt_bias=bias.contiguous(),
                dt_limit=s.dt_limit,
                starts=taps.starts,
                chunk=s.chunk,
            )
            wide = torch.promote_types(h.dtype, torch.float32)
            parts = zip(h.flatten(0, 1).split(256), C.flatten(0, 1).split(256), strict=True)
            taps.add(name, torch.stack([(a.to(wide) * c.to(wide)).square().sum(0) for a, c in parts]).sum(0))

    taps.output(name, mixer.in_proj, hook)


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    return Units(importance={"output": (sums[f"{where}.state"] / tokens).sqrt()})


def _cut(spec: Mamba2, wanted: Mamba2, units: Units, how: How) -> Edits:
    state = flat(best(units.importance[how.by], wanted.d_state), spec.d_state)
    return taking("M", mamba2_rows(spec, torch.arange(spec.d_inner), state, torch.arange(spec.n_heads)))


AXIS = Axis(
    name="ssm_state",
    title="channels of the SSM state",
    symbol="M",
    fields=("d_state",),
    measures=("output",),
    watch=_watch,
    find=_find,
    cut=_cut,
)
