"""A whole model's step for one token, written down once and then run by a single call.

A tape is a list of records for kernels/native/decode.cpp: linear layers with what they read (normed, gated, merged),
the convolution's and the state's step, attention over the cache. Layers write their records in `_capture` at the end of
their files; model/step.py asks for the tape of a cache and runs it.

    tape = Tape(batch, compute)
    h = tape.linear(up_proj, tape.rows(tape.x, norm=norm))
    tape.linear(down_proj, tape.rows(h, activation="relu2"), onto=tape.x)

Weights are read where they lie, so a change of their values shows at the next token. Where they are float32 masters of
a model that computes in bfloat16, a rounded copy is kept for reading, and made anew when they have changed; training
drops the copies (half of the masters' size).

Shapes   B rows (at most MOST_ROWS), D channels.
Numbers  activations float32 from the embedding to the logits, bfloat16 at the input of int4 products and of batches
         where the model computes in it; weights as stored.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from plait.ops.dispatch import native_serves

MOST_ROWS = 8
FORMATS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}
MOST_GROUPS = 1024
Y_AT = 22  # where a linear record says what it writes to

Word = int | float | Tensor | None
Home = tuple[dict[str, Tensor | None], str]
# copies of float32 masters in bfloat16, by the layer: the master, its version, the copy
Rounded = dict[nn.Module, tuple[Tensor, int, Tensor]]


class UnfitError(Exception):
    """This model cannot be written on a tape; the ordinary path serves it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What a linear layer reads: (B, D) `x`, activated or gated by `z`, then normed in `groups`.

    source: "", "relu2", "silu gate", "relu2 gate", or "merge" for attention's spans, whose heads have `head` channels.
    weight: the norm's, as two words.
    """

    x: Tensor
    z: Tensor | None = None
    source: str = ""
    head: int = 0
    weight: tuple[int, int] = (0, 0)
    groups: int = 0
    eps: float = 0.0

    def words(self, K: int) -> tuple["Word", ...]:
        """What decode.cpp calls an Input, after its source."""
        ldz = 0 if self.z is None else self.z.stride(0)
        return (
            *(self.x, self.z, self.x.stride(0), ldz, K),
            *(self.head, *self.weight, self.groups, self.eps),
        )


@dataclass(slots=True)
class Link:
    """A tensor of a layer's state that may be replaced between tokens: where its address stands in the records."""

    state: object
    name: str
    at: int
    seen: Tensor | None = None


class Tape:
    """Records of one decode step for a cache of `batch` sequences."""

    def __init__(self, batch: int, compute: torch.dtype, rounded: Rounded) -> None:
        """
        Args:
            batch: B.
            compute: the model's dtype for activations, float32 or bfloat16.
            rounded: the model's copies, which are used while their masters stay as they are, and added to.

        Raises: UnfitError for another dtype, too many rows, or where the kernels are not compiled.
        """
        if compute not in (torch.float32, torch.bfloat16) or batch > MOST_ROWS or not native_serves("decode"):
            raise UnfitError
        from plait.kernels.native import decode

        self._native = decode
        self.batch, self.compute, self._rounded = batch, compute, rounded
        self._words = array("q")
        self._links: list[Link] = []
        # working memory, what of it a layer may still take, and what else must stay alive
        self._memory: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._held: list[Tensor] = []
        self._last: Rows | None = None
        self._angles: dict[object, Tensor] = {}
        # what the records point to: parameters by where a module keeps them
        self._read: list[Home] = []
        self._addresses: list[int] = []
        self._masters: list[tuple[Home, Tensor, int]] = []

    # ---- records

    def embed(self, module: nn.Module) -> None:
        """Begin: the stream `x` becomes rows of the embedding."""
        table = self._find(module, "weight")
        self.x = torch.empty(self.batch, table.shape[1])
        self._record("embed", *self.numbers(module, "weight"), self.x, table.shape[1])

    def begin_layer(self) -> None:
        """Memory of the layer before may be used again: a layer's first record waits for all threads."""
        self._spare = list(self._memory)

    def rows(self, x: Tensor, z: Tensor | None = None, *, source: str = "", norm: nn.Module | None = None) -> Rows:
        """What a linear layer is to read; see Rows. `norm` has a weight and an eps."""
        return self.normed(Rows(x=x, z=z, source=source), norm)

    def normed(self, rows: Rows, norm: nn.Module | None, groups: int = 1) -> Rows:
        """The same rows after an RMS norm, if there is one, each of `groups` parts by itself."""
        if norm is None:
            return rows
        return replace(rows, weight=self.numbers(norm, "weight"), groups=groups, eps=float(norm.eps))  # type: ignore[arg-type]

    def linear(self, module: nn.Module, rows: Rows, *, onto: Tensor | None = None, final: bool = False) -> Tensor:
        """A linear layer into fresh memory (B, N), onto what is there, or (`final`) into the logits of each call.

        Raises: UnfitError for a layer that computes in numbers the kernels do not have.
        """
        matrix, N, K = self._matrix(module)
        same = rows is self._last
        y = onto if onto is not None else torch.empty(0) if final else self.memory(N)
        at = self._record(
            "linear",
            same,
            *(self._native.SOURCES[rows.source], *rows.words(K)),
            *matrix,
            *self.numbers(module, "bias"),
            None if final else y,
            *(N, onto is not None, final and self.compute == torch.bfloat16),
            waits=not same,
        )
        self._last = rows
        if final:
            self._logits_at, self._n_logits = at + Y_AT, N
        return y

    def conv_step(self, x: Tensor, state: object, conv: nn.Module) -> None:
        """The convolution and SiLU over x (B, D), in place; state.conv is (B, D, taps)."""
        D, taps = self._find(conv, "weight").shape
        at = self._record(
            "conv", *(0, 0, 0), D, taps, x, x.stride(0), *self.numbers(conv, "weight"), *self.numbers(conv, "bias"), 1
        )
        self._links.append(Link(state, "conv", at))

    def state_step(
        self, x: Tensor, dt: Tensor, state: object, mixer: nn.Module, *, groups: int, dt_limit: Sequence[float]
    ) -> Tensor:
        """The recurrence over rows of x = [x, B, C] and dt (B, H), one stride; state.ssm is (B, H, P, N)."""
        H, P, N = state.ssm.shape[1:]  # type: ignore[attr-defined]
        y = self.memory(H * P)
        names = ("A_log", "D", "dt_bias")
        parameters = [word for name in names for word in self.numbers(mixer, name)]
        at = self._record(
            "state",
            *(0, 0, 0),
            *(H, P, N, groups),
            x,
            dt,
            x.stride(0),
            dt.stride(0),
            *parameters,
            1,
            *map(float, dt_limit),
            y,
        )
        self._links.append(Link(state, "ssm", at))
        return y

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: object,
        *,
        heads: tuple[int, int, int],
        norms: tuple[nn.Module | None, nn.Module | None] = (None, None),
        rotation: tuple[Tensor, float] | None = None,
    ) -> Rows:
        """Attention of q (B, H P) over the cache and the new k, v (B, K P); `heads` is (H, K, P).

        norms: of q and k per head. rotation: frequencies (pairs,) and temperature. state.k, state.v: (B, K, room, P).
        """
        H, K, P = heads
        angles, pairs = self._turning(rotation)
        eps = 0.0 if norms[0] is None else float(norms[0].eps)  # type: ignore[arg-type]
        scales = [word for norm in norms for word in ((0, 0) if norm is None else self.numbers(norm, "weight"))]
        at = self._record("heads", *(0, 0, 0) * 2, K, P, q, k, v, H, *scales, eps, angles, pairs)
        self._links += [Link(state, "k", at), Link(state, "v", at + 3)]
        parts, seen = map(self.memory, self._native.spans(H, P))
        at = self._record("attend", *(0, 0, 0) * 2, K, P, q, H, parts, seen)
        self._links += [Link(state, "k", at), Link(state, "v", at + 3)]
        return Rows(x=parts, z=seen, source="merge", head=P)

    def memory(self, n: int) -> Tensor:
        """(B, n) float32 for use within a layer."""
        for i, spare in enumerate(self._spare):
            if spare.shape[1] == n:
                return self._spare.pop(i)
        self._memory.append(torch.empty(self.batch, n))
        return self._memory[-1]

    def numbers(self, module: nn.Module, name: str) -> tuple[int, int]:
        """A small parameter as two words, its address and whether it is bfloat16; (0, 0) for None."""
        if getattr(module, name, None) is None:
            return 0, 0
        t = self._find(module, name)
        if t.dtype not in (torch.float32, torch.bfloat16):
            raise UnfitError
        return self._address(module, name, t), int(t.dtype == torch.bfloat16)

    # ---- use

    def is_fresh(self) -> bool:
        """Whether all parameters are where they were, and the masters of rounded copies unchanged."""
        return [home[name].data_ptr() for home, name in self._read] == self._addresses and all(  # type: ignore[union-attr]
            home[name] is t and _version(t) == version for (home, name), t, version in self._masters
        )

    def follow(self) -> None:
        """Find the states' tensors where they are now; UnfitError if one has taken another form."""
        for link in self._links:
            t = getattr(link.state, link.name)
            if t is not link.seen:
                self._follow(link, t)

    def run(self, ids: Tensor, positions: Tensor, mask: Tensor | None, n_keys: int) -> Tensor:
        """One token of each sequence, after `follow`; states move on, keys and values are written at n_keys - 1.

        Args:
            ids: (B, 1) int64, checked.
            positions: (B,) int64.
            mask: (B, n_keys) bool, False at padding.
            n_keys: tokens in the cache, the new one included.

        Returns: (B, 1, V) logits in the compute dtype.
        """
        logits = torch.empty(self.batch, 1, self._n_logits, dtype=self.compute)
        self._words[self._logits_at] = logits.data_ptr()
        mask = None if mask is None else mask.contiguous()
        self._native.run_tape(self._words, self.batch, ids.contiguous(), positions, mask, n_keys)
        return logits

    def _follow(self, link: Link, t: Tensor) -> None:
        if t.dtype not in (torch.float32, torch.bfloat16) or t.shape[0] != self.batch:
            raise UnfitError
        if not t.is_contiguous():
            t = t.contiguous()
            setattr(link.state, link.name, t)
        self._words[link.at] = t.data_ptr()
        self._words[link.at + 1] = int(t.dtype == torch.bfloat16)
        self._words[link.at + 2] = t.shape[2]
        link.seen = t

    # ---- writing

    def _record(self, code: str, *words: Word, waits: bool = True) -> int:
        """Returns where its own words begin."""
        at = len(self._words)
        self._words.extend(self._native.record(code, *words, waits=waits))
        self._last = None
        return at + 3

    def _turning(self, rotation: tuple[Tensor, float] | None) -> tuple[Tensor | None, int]:
        """Cosines and sines of the new positions, made once for all layers that turn alike."""
        if rotation is None:
            return None, 0
        frequencies, temperature = rotation
        key, pairs = (frequencies.data_ptr(), temperature), frequencies.shape[0]
        if key not in self._angles:
            table = torch.empty(self.batch, 2 * pairs)
            self._record("angles", frequencies, table, pairs, temperature, waits=False)
            self._angles[key] = table
            self._held.append(frequencies)
        return self._angles[key], pairs

    def _matrix(self, module: nn.Module) -> tuple[tuple[Word, ...], int, int]:
        """A linear layer's weights as the words of gemv.h's Matrix, and its sizes N and K."""
        rounds = self.compute == torch.bfloat16
        if getattr(module, "codes", None) is not None:
            codes, scales = self._find(module, "codes"), self._find(module, "scales")
            bits, group = int(module.bits), int(module.group)  # type: ignore[arg-type]
            N, K = codes.shape[0], codes.shape[1] * 8 // bits
            if K % 64 or group < 32 or group & (group - 1) or K // group > MOST_GROUPS or scales.dtype != torch.float16:
                raise UnfitError
            addresses = [
                0 if getattr(module, name, None) is None else self._address(module, name, self._find(module, name))
                for name in ("codes", "scales", "zeros")
            ]
            return (*addresses, FORMATS[bits], group, N, K, rounds), N, K
        number_format = getattr(module, "number_format", None)
        if number_format is not None and (number_format.weight or number_format.input):
            raise UnfitError
        w = self._find(module, "weight")
        if w.dtype not in (torch.float32, torch.bfloat16):
            raise UnfitError
        N, K = w.shape
        if w.dtype == torch.float32 and rounds:
            address, stored = self._round(module, w).data_ptr(), torch.bfloat16
        else:
            address, stored = self._address(module, "weight", w), w.dtype
        return (address, None, None, FORMATS[stored], 0, N, K, rounds), N, K

    def _round(self, module: nn.Module, w: Tensor) -> Tensor:
        version = _version(w)
        source, old, copy = self._rounded.get(module, (None, -1, w))
        if source is not w or old != version:
            copy = w.detach().to(torch.bfloat16)
            self._rounded[module] = (w, version, copy)
        self._masters.append(((_home(module, "weight"), "weight"), w, version))
        self._held.append(copy)
        return copy

    def _find(self, module: nn.Module, name: str) -> Tensor:
        t = _home(module, name).get(name)
        if type(t) not in (Tensor, nn.Parameter) or not t.is_cpu or not t.is_contiguous():  # type: ignore[union-attr]
            raise UnfitError
        return t  # type: ignore[return-value]

    def _address(self, module: nn.Module, name: str, t: Tensor) -> int:
        self._read.append((_home(module, name), name))
        self._addresses.append(t.data_ptr())
        return t.data_ptr()


def _home(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    return module._parameters if name in module._parameters else module._buffers  # type: ignore[return-value]


def _version(t: Tensor) -> int:
    # tensors made in inference mode cannot change outside of it
    return 0 if t.is_inference() else t._version
