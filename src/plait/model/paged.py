"""Memory for many sequences that come and go: pages of keys and values, and slots of constant-size states.

A page holds PAGE tokens' keys and values of every attention layer; a slot holds the convolution windows and scan states
of one sequence. Which pages and slot are whose is the business of plait.engine.pool; here they are read and written:

    rows = Rows(cache, slots, tables, lengths)      some sequences, as `model.hidden` takes a cache
    model.hidden(ids, cache=rows);  rows.store()
    step_rows(model, cache, ...)                    one token of each by one native call, see model/step.py

Shapes   B sequences, S slots, M pages, K key/value heads, P head size, H heads, N state size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.kept import KV_FORMS, STATE_FORMS, Kept
from plait.model.layers import KINDS
from plait.model.layers.attention import Attention, FixedKV, KVState
from plait.model.layers.mamba2 import Mamba2, Mamba2State
from plait.ops.attention import attention
from plait.ops.decode_attention import decode_attention
from plait.ops.soft_attention import soft_attention
from plait.ops.tape import MOST_ROWS, Tape

# as many keys as the native kernels take at a time, or a multiple
PAGE = 64

Held = list[list[Tensor]]
"""states of one sequence as they are kept, of each layer that has a state of constant size"""


class PagedKV:
    """Keys and values of one layer, k and v (M, K, PAGE, P)."""

    def __init__(self, spec: Attention, n_pages: int, form: str, device: torch.device, dtype: torch.dtype) -> None:
        shape = n_pages, spec.n_kv_heads, PAGE, spec.head_dim
        self.kept = tuple(Kept(shape, form, device, dtype) for _ in range(2))

    @property
    def k(self) -> Tensor:
        """Keys as they are kept."""
        return self.kept[0].codes

    @property
    def v(self) -> Tensor:
        """Values as they are kept."""
        return self.kept[1].codes

    def gathered(self, table: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first n tokens of a sequence, as (1, K, n, P) views of copies."""
        used = table[: -(-n // PAGE)]
        return tuple(t.read((used,)).transpose(0, 1).flatten(1, 2)[None, :, :n] for t in self.kept)  # type: ignore[return-value]

    def put(self, table: Tensor, first: int, k: Tensor, v: Tensor) -> None:
        """Write k and v (1, K, n, P) as tokens first ... first + n - 1 of a sequence."""
        at = torch.arange(first, first + k.shape[2], device=table.device)
        pages, places = table[at // PAGE], at % PAGE
        for kept, t in zip(self.kept, (k, v), strict=True):
            kept.write((pages, slice(None), places), t[0].transpose(0, 1))

    def put_each(self, tables: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v (B, K, P) as token at[b] of each sequence."""
        pages = tables.gather(1, at[:, None] // PAGE)[:, 0]
        for kept, t in zip(self.kept, (k, v), strict=True):
            kept.write((pages, slice(None), at % PAGE), t)


class RowsKV(FixedKV):
    """Some sequences' keys and values, as the mixer of attention takes them."""

    def __init__(self, pages: PagedKV, tables: Tensor, lengths: Sequence[int] | None) -> None:
        """tables: (B, ...) int64. lengths: tokens before the coming ones; None where the host does not know them."""
        self.pages, self.tables, self.lengths = pages, tables, lengths

    def attend(self, s: Attention, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Write (B, L, K, P) keys and values after what is there; the (B, L, H, P) queries see all before them."""
        L, pages = q.shape[1], self.pages
        if L == 1 or self.lengths is None:
            pages.put_each(self.tables, positions[:, 0], k[:, 0], v[:, 0])
        else:
            for b, n in enumerate(self.lengths):
                pages.put(self.tables[b], n, k[b : b + 1].transpose(1, 2), v[b : b + 1].transpose(1, 2))
        if self.lengths is None or (L == 1 and q.is_cuda and not s.is_soft and pages.k.dtype == q.dtype):
            table = self.tables.int()
            return decode_attention(q[:, 0], pages.k, pages.v, positions[:, 0] + 1, page_table=table)[:, None]
        # each by itself: what a sequence gets does not depend on the others
        out = []
        for b, n in enumerate(self.lengths):
            keys, values = (t.transpose(1, 2) for t in self.pages.gathered(self.tables[b], n + L))
            mine = q[b : b + 1]
            soft = {"cap": s.soft_cap, "clip": s.soft_clip}
            out.append(soft_attention(mine, keys, values, **soft) if s.is_soft else attention(mine, keys, values))
        return torch.cat(out)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing of its own."""
        return {}


class SlotState:
    """Windows conv (S, D, W) and states ssm (S, H, P, N) of one Mamba-2 layer."""

    def __init__(
        self, spec: Mamba2, n_slots: int, form: str, device: torch.device, dtype: torch.dtype, layer: int = 0
    ) -> None:
        """form: of states, see plait.model.kept. layer: its index, for what is rounded at random."""
        self.conv = torch.zeros(n_slots, spec.conv_dim, spec.conv_width, device=device, dtype=dtype)
        shape = n_slots, spec.n_heads, spec.head_dim, spec.d_state
        self.kept, self.layer = Kept(shape, form, device, torch.promote_types(dtype, torch.float32)), layer

    @property
    def ssm(self) -> Tensor:
        """States as they are kept."""
        return self.kept.codes

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """Copies of some sequences' states, in float32 those of the scan."""
        return {"conv": self.conv[slots], "ssm": self.kept.read((slots,))}

    def write(self, slots: Tensor, tensors: dict[str, Tensor], lengths: Sequence[int] | None = None) -> None:
        """Put them back; rounded at random by their lengths in tokens, if the form asks for it and these are given."""
        self.conv[slots] = tensors["conv"]
        at_random = self.kept.is_random and lengths is not None
        seeds = [n << 16 | self.layer for n in lengths] if at_random and lengths is not None else None
        self.kept.write((slots,), tensors["ssm"], seeds)

    def tensors(self) -> list[Tensor]:
        """All that is kept, slots first."""
        return [self.conv, *self.kept.tensors()]


class RowsState:
    """Some sequences' states, as the mixer of Mamba-2 takes them."""

    def __init__(self, slots: SlotState, rows: Tensor) -> None:
        self.slots, self.rows = slots, rows
        parts = slots.read(rows)
        self.conv, self.ssm = parts["conv"], parts["ssm"]

    def store(self, lengths: Sequence[int]) -> None:
        """Put them back where they came from; they are of so many tokens now."""
        self.slots.write(self.rows, {"conv": self.conv, "ssm": self.ssm}, lengths)

    def tensors(self) -> dict[str, Tensor]:
        """conv (B, D, W) and ssm (B, H, P, N)."""
        return {"conv": self.conv, "ssm": self.ssm}

    def reserve(self, n_tokens: int) -> None:
        """Nothing to do."""

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Take other contents."""
        self.conv, self.ssm = tensors["conv"], tensors["ssm"]


class PagedCache:
    """The memory of all sequences of one model. Slot 0 and page 0 are nobody's: rows that fill up a batch use them."""

    def __init__(
        self,
        config: ModelConfig,
        n_slots: int,
        n_pages: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        state_form: str = "fp32",
        kv_form: str = "auto",
    ) -> None:
        """
        Args:
            config: the model's.
            n_slots, n_pages: of sequences; one more of each is made.
            device, dtype: of what the model computes with, and of convolution windows.
            state_form, kv_form: of scan states, and of keys and values, see plait.model.kept.

        Raises: ValueError for an unknown form.
        """
        for name, form, known in (("state_form", state_form, STATE_FORMS), ("kv_form", kv_form, KV_FORMS)):
            if form not in known:
                raise ValueError(f"{name}={form!r}: must be one of {', '.join(known)}")
        self.config, self.device, self.dtype = config, device, dtype
        self.n_slots, self.n_pages = n_slots, n_pages
        self.states: list[PagedKV | SlotState | None] = []
        for i, spec in enumerate(config.layers):
            if isinstance(spec, Attention):
                self.states.append(PagedKV(spec, n_pages + 1, kv_form, device, dtype))
            elif isinstance(spec, Mamba2):
                self.states.append(SlotState(spec, n_slots + 1, state_form, device, dtype, i))
            else:
                assert KINDS[spec.symbol].state(spec, 1, device, dtype) is None
                self.states.append(None)
        # as model/step.py keeps it, for batches of so many rows
        self.tape: tuple[object, Tape | None] | None = None
        self.batch = MOST_ROWS

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence that do not grow."""
        tensors = (t[0] for state in self.slot_states() for t in state.tensors())
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, of all layers."""
        tensors = (t[0] for state in self.kv_states() for kept in state.kept for t in kept.tensors())
        return sum(t.numel() * t.element_size() for t in tensors)

    def slot_states(self) -> list[SlotState]:
        """Of the layers with a state of constant size."""
        return [state for state in self.states if isinstance(state, SlotState)]

    def kv_states(self) -> list[PagedKV]:
        """Of the layers of attention."""
        return [state for state in self.states if isinstance(state, PagedKV)]

    def table(self, pages: Sequence[int]) -> Tensor:
        """Page numbers as an index."""
        return torch.tensor(pages, dtype=torch.int64, device=self.device)

    def clear(self, slot: int) -> None:
        """Make a slot that of a sequence without tokens."""
        for state in self.slot_states():
            for t in state.tensors():
                t[slot] = 0

    def held(self, slot: int) -> Held:
        """Copies of a sequence's states of constant size."""
        return [[t[slot].clone() for t in state.tensors()] for state in self.slot_states()]

    def hold(self, slot: int, held: Held) -> None:
        """Put what `held` gave into a slot."""
        for state, tensors in zip(self.slot_states(), held, strict=True):
            for mine, theirs in zip(state.tensors(), tensors, strict=True):
                mine[slot] = theirs

    def copy_page(self, old: int, new: int) -> None:
        """Copy keys and values of a page."""
        for state in self.kv_states():
            for kept in state.kept:
                for t in kept.tensors():
                    t[new] = t[old]

    def save(self, slot: int, pages: Sequence[int], n_tokens: int) -> Cache:
        """A sequence's memory as an ordinary cache of one sequence."""
        cache, table = Cache(self.config, 1, device=self.device, dtype=self.dtype), self.table(pages)
        for mine, theirs in zip(self.states, cache.states, strict=True):
            if isinstance(mine, PagedKV) and isinstance(theirs, KVState):
                k, v = mine.gathered(table, n_tokens)
                theirs.replace({"k": k.contiguous(), "v": v.contiguous()})
            elif isinstance(mine, SlotState) and isinstance(theirs, Mamba2State):
                theirs.replace(mine.read(self.table([slot])))
        cache.n_tokens, cache.lengths = n_tokens, torch.tensor([n_tokens], device=self.device)
        return cache

    def take(self, slot: int, pages: Sequence[int], cache: Cache) -> None:
        """Put an ordinary cache of one sequence, without padding, into a slot and pages."""
        table = self.table(pages)
        for mine, theirs in zip(self.states, cache.states, strict=True):
            if isinstance(mine, PagedKV) and theirs is not None:
                tensors = theirs.tensors()
                mine.put(table, 0, tensors["k"], tensors["v"])
            elif isinstance(mine, SlotState) and theirs is not None:
                mine.write(self.table([slot]), theirs.tensors())


class Rows(Cache):
    """Some sequences of a paged cache for one call of `model.hidden`; then `store`."""

    def __init__(
        self, paged: PagedCache, slots: Sequence[int], tables: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> None:
        """
        Args:
            paged: where they are.
            slots, tables, lengths: of each sequence; tables with pages for the coming tokens too.
        """
        self.config, self.mask, self.tape = paged.config, None, None
        self.lengths, self.fed = paged.table(lengths), list(lengths)
        self.n_tokens = max(lengths)
        width = max(map(len, tables))
        table = paged.table([[*pages, *[0] * (width - len(pages))] for pages in tables])  # type: ignore[list-item]
        at = paged.table(slots)
        self._bind(paged, at, table, lengths)

    def _bind(self, paged: PagedCache, slots: Tensor, tables: Tensor, lengths: Sequence[int] | None) -> None:
        self.states = []
        for state in paged.states:
            if isinstance(state, PagedKV):
                self.states.append(RowsKV(state, tables, lengths))
            else:
                self.states.append(None if state is None else RowsState(state, slots))

    def extend(self, L: int, mask: Tensor | None) -> None:
        """Count L more tokens of each."""
        assert mask is None
        self.lengths = self.lengths + L
        self.fed = [n + L for n in self.fed]
        self.n_tokens += L

    def store(self) -> None:
        """Put the states back; keys and values are where they belong already."""
        for state in self.states:
            if isinstance(state, RowsState):
                state.store(self.fed)


class StaticRows(Rows):
    """The same for one token of each, told by tensors on the device alone: such a step can be captured."""

    def __init__(self, paged: PagedCache, slots: Tensor, tables: Tensor, lengths: Tensor) -> None:
        """
        Args:
            paged: its keys and values in the compute dtype, its states not rounded at random.
            slots, lengths: (B,) int64; tables: (B, pages) int64.
        """
        self.config, self.mask, self.tape = paged.config, None, None
        self.lengths, self.fed, self.n_tokens = lengths, [], 0
        self._bind(paged, slots, tables, None)
