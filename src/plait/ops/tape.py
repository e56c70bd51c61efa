"""A whole model's step for one token, written down once and then run by a single call.

A tape is a list of records for kernels/native/decode.cpp: linear layers with what they read (normed, gated, merged),
the convolution's and the state's step, attention over the cache. Layers write their records in `_capture` at the end of
their files; model/step.py asks for the tape of a cache and runs it.

    tape = Tape(batch, compute, model.rounded, Watch(model.modules()))
    tape.embed(model.embed)
    h = tape.linear(up_proj, tape.rows(tape.x, norm=norm))
    tape.linear(down_proj, tape.rows(h, source="relu2"), onto=tape.x)

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
from plait.ops.watch import TURNS, Watch, news
from plait.ops.weights import Rounded, UnfitError, Weights

MOST_ROWS = 64
Y_AT = 22  # where a linear record says what it writes to

Word = int | float | Tensor | None


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

    def __init__(
        self, batch: int, compute: torch.dtype, rounded: Rounded, watch: Watch, *, has_places: bool = False
    ) -> None:
        """
        Args:
            batch: B.
            compute: the model's dtype for activations, float32 or bfloat16.
            rounded: the model's copies, which are used while their masters stay as they are, and added to.
            watch: of the model's modules.
            has_places: for `run_rows`: states have slots, and keys and values pages, that are not the rows'.

        Raises: UnfitError for another dtype, too many rows, or where the kernels are not compiled.
        """
        if compute not in (torch.float32, torch.bfloat16) or batch > MOST_ROWS or not native_serves("decode"):
            raise UnfitError
        from plait.kernels.native import decode

        self._native, self._watch, self._has_places = decode, watch, has_places
        # the first look is at everything
        self._turn, self._told = -1, news()
        self.batch, self.compute, self.weights = batch, compute, Weights(compute, rounded)
        self._words = array("q")
        self._links: list[Link] = []
        # working memory, what of it a layer may still take, and what else must stay alive
        self._memory: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._held: list[Tensor] = []
        self._last: Rows | None = None
        self._angles: dict[object, Tensor] = {}

    # ---- records

    def embed(self, module: nn.Module) -> None:
        """Begin: the stream `x` becomes rows of the embedding."""
        table = self.weights.find(module, "weight")
        self.x = torch.empty(self.batch, table.shape[1])
        self._record("embed", *self.weights.numbers(module, "weight"), self.x, table.shape[1])

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
        return replace(rows, weight=self.weights.numbers(norm, "weight"), groups=groups, eps=float(norm.eps))  # type: ignore[arg-type]

    def linear(self, module: nn.Module, rows: Rows, *, onto: Tensor | None = None, final: bool = False) -> Tensor:
        """A linear layer into fresh memory (B, N), onto what is there, or (`final`) into the logits of each call.

        Raises: UnfitError for a layer that computes in numbers the kernels do not have.
        """
        matrix, N, K = self.weights.matrix(module)
        # rows of a ternary weight that stay high are a layer of their own, after the others
        tail = getattr(module, "high", None)
        y = onto
        if onto is None and not final:
            y = self.memory(N + (0 if tail is None else tail.weight.shape[0]))
        self._product(module, matrix, rows, y, (N, K), adds=onto is not None)
        if tail is not None:
            matrix, n, K = self.weights.matrix(tail)
            self._product(tail, matrix, rows, y[:, N:], (n, K), adds=onto is not None)  # type: ignore[index]
        return torch.empty(0) if y is None else y

    def _product(
        self,
        module: nn.Module,
        matrix: tuple[int, ...],
        rows: Rows,
        y: Tensor | None,
        sizes: tuple[int, int],
        adds: bool,
    ) -> None:
        """One matrix of a linear layer into y; into the logits where there is none."""
        (N, K), same, final = sizes, rows is self._last, y is None
        at = self._record(
            "linear",
            same,
            *(self._native.SOURCES[rows.source], *rows.words(K)),
            *matrix,
            *self.weights.numbers(module, "bias"),
            y,
            *(N if y is None else y.stride(0), adds, final and self.compute == torch.bfloat16),
            waits=not same,
        )
        self._last = rows
        if final:
            self._logits_at, self._n_logits = at + Y_AT, N

    def conv_step(self, x: Tensor, state: object, conv: nn.Module) -> None:
        """The convolution and SiLU over x (B, D), in place; state.conv is (B, D, taps)."""
        D, taps = self.weights.find(conv, "weight").shape
        at = self._record(
            "conv",
            *(0, 0, 0),
            D,
            taps,
            x,
            x.stride(0),
            *self.weights.numbers(conv, "weight"),
            *self.weights.numbers(conv, "bias"),
            1,
        )
        self._links.append(Link(state, "conv", at))

    def state_step(
        self, x: Tensor, dt: Tensor, state: object, mixer: nn.Module, *, groups: int, dt_limit: Sequence[float]
    ) -> Tensor:
        """The recurrence over rows of x = [x, B, C] and dt (B, H), one stride; state.ssm is (B, H, P, N)."""
        H, P, N = state.ssm.shape[1:]  # type: ignore[attr-defined]
        y = self.memory(H * P)
        names = ("A_log", "D", "dt_bias")
        parameters = [word for name in names for word in self.weights.numbers(mixer, name)]
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
        scales = [word for norm in norms for word in ((0, 0) if norm is None else self.weights.numbers(norm, "weight"))]
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

    # ---- use

    def is_fresh(self) -> bool:
        """Whether the model is as it was; see ops/watch.py for when it is looked at.

        Drops rounded copies whose masters have changed unseen.
        """
        told, self._told = self._told, news()
        self._turn += 1
        if not self.weights.has_copies():
            return False
        if told == self._told and self._turn % TURNS:
            return True
        if not self._watch.is_same() or not self.weights.is_fresh():
            return False
        if self._native.copies_hold(self.weights.pairs, self._turn):
            return True
        self.weights.forget_copies()
        return False

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

    def run_rows(
        self, ids: Tensor, slots: Tensor, lengths: Tensor, tables: Tensor, into: Tensor | None = None
    ) -> Tensor:
        """One token of each of n <= B sequences, after `follow`, wherever their states and pages are.

        Args:
            ids: (n,) int64, checked.
            slots: (n,) int64, whose state is whose.
            lengths: (n,) int64, tokens of each sequence, the new one included.
            tables: (n, pages) int32: the pages of each sequence's keys and values, each of a multiple of 64 tokens.
            into: (n,) int64, slots where the rows' states go, None for where they came from. Rows may then be tokens of
                one sequence in their order: each reads the slot that the one before it wrote.

        Returns: (n, V) logits in the compute dtype; a row's do not depend on the others.
        """
        logits = torch.empty(len(ids), self._n_logits, dtype=self.compute)
        self._words[self._logits_at] = logits.data_ptr()
        self._native.run_rows(self._words, ids, lengths - 1, slots, lengths, tables, into)
        return logits

    def _follow(self, link: Link, t: Tensor) -> None:
        if t.dtype not in (torch.float32, torch.bfloat16) or (t.shape[0] != self.batch and not self._has_places):
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
        return at + 2

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
