"""Logits to token ids on the device: every row with its own settings and its own uniform number.

    x = logits / t                            t = 0 ends here with the first of the largest
    keep the k largest; of those the largest whose mass before them is below p; of those x >= max x + log m
    the first id whose cumulated probability is above the row's uniform number

Equal logits at an edge stay or go together. Settings are tensors, so that a captured step serves any of them; they mean
what `plait.engine.request.Sampling` says.

Shapes   B rows, V vocabulary.
Numbers  logits and probabilities in float32, their sums over the vocabulary in float64 where a token is picked.
Source   Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p); Steele et al.
         2014, SplitMix (the hash).
"""

import torch
from torch import Tensor

from plait.ops.dispatch import Op, triton_serves


@Op
def sample_ids(
    logits: Tensor, uniform: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Choose the next token of every row. This body is the reference: it sorts the vocabulary.

    Args:
        logits: (B, V), any float dtype.
        uniform: (B,) float64 in [0, 1).
        temperature: (B,) float32; 0 takes the likeliest.
        top_k: (B,) int32; 0, or V and more, keeps all.
        top_p, min_p: (B,) float32; 1 and 0 keep all.

    Returns: (B,) int64; -1 for a row that holds what is no number.
    """
    kept = kept_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    cumulated = kept.softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)[:, 0]
    greedy = temperature == 0
    ids = torch.where(greedy, logits.argmax(-1), drawn)
    return ids.masked_fill(torch.where(greedy, logits.isnan().any(-1), cumulated[:, -1].isnan()), -1)


@sample_ids.backend("triton", when=lambda logits, uniform, **_: logits.dtype != torch.float64 and triton_serves(logits))
def _(logits: Tensor, uniform: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    from plait.kernels.triton.sample import sample_ids as kernel

    return kernel(logits, uniform, temperature, top_k, top_p, min_p)[0]


def kept_logits(logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What is left of the logits, by sorting: (B, V) float32 over the temperature, -inf at what cannot be drawn.

    Args: as for `sample_ids`; a temperature of 0 counts as 1.
    """
    x = logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]
    V = x.shape[-1]
    ranked = x.sort(-1, descending=True).values
    k = torch.where((top_k < 1) | (top_k > V), V, top_k).long()[:, None]
    # only k of them count for the mass, even where several equal the last
    ranked = ranked.masked_fill(torch.arange(V, device=x.device) >= k, -torch.inf)
    floor = ranked.gather(-1, k - 1)
    p = ranked.softmax(-1)
    n_kept = (p.cumsum(-1) - p < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    floor = torch.where(top_p[:, None] < 1, torch.maximum(floor, ranked.gather(-1, n_kept - 1)), floor)
    floor = torch.maximum(floor, ranked[:, :1] + min_p[:, None].log())
    return x.masked_fill(x < floor, -torch.inf)


def uniform_numbers(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) that depend on seed and position only, computed where the tensors are.

    Args:
        seeds, positions: (B,) int64; a seed's 64 bits count, whatever its sign.

    Returns: (B,) float64.
    """
    mixed = _mixed(_mixed(seeds) + positions)
    return _shifted(mixed, 12).double() * 2.0**-52


def _mixed(x: Tensor) -> Tensor:
    # products and sums of 64 bits wrap around, as the hash wants; the constants are written with their sign
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of its 64 bits without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
