"""Run tapes of decode operations: the records that decode.cpp knows, and single operations as tapes of one record."""

import struct
from array import array

import torch
from torch import Tensor

from plait.kernels.native.library import call

# the order of decode.cpp and gemv.h
CODES = ("embed", "linear", "conv", "state", "angles", "heads", "attend", "copy")
SOURCES = {"": 0, "relu2": 1, "silu gate": 2, "relu2 gate": 3, "merge": 4}
WORDS = 40  # of a record
MOST_SPANS = 16  # of keys, that threads share
LANES = 16  # a head's part of a span is rounded up to so many numbers

Word = int | float | Tensor | None


def record(code: str, *words: Word, waits: bool = True) -> list[int]:
    """A record: tensors become addresses, None zero, floats the bits of a double."""
    row = [CODES.index(code), int(waits), *map(_word, words)]
    assert len(row) <= WORDS
    return row + [0] * (WORDS - len(row))


def run_tape(
    words: array, batch: int, ids: Tensor | None, positions: Tensor | None, mask: Tensor | None, n_keys: int
) -> None:
    """Run the records of a tape: see decode.cpp, and plait.ops.tape.Tape for the arguments."""
    address, length = words.buffer_info()
    call("decode", "run_tape", address, length // WORDS, batch, ids, positions, mask, n_keys)


def run_rows(
    words: array,
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    lengths: Tensor,
    tables: Tensor,
    into: Tensor | None = None,
) -> None:
    """The same for sequences that come and go: see plait.ops.tape.Tape.run_rows for the arguments."""
    address, length = words.buffer_info()
    name, places = ("run_rows", (slots,)) if into is None else ("run_chain", (slots, into))
    places = (*places, lengths, tables, tables.shape[1])
    call("decode", name, address, length // WORDS, len(ids), ids, positions, *places)


def copies_hold(pairs: array, turn: int) -> bool:
    """Whether bfloat16 copies are still their float32 masters rounded, at a few places that differ from turn to turn.

    Args:
        pairs: addresses of a master and its copy, and how many numbers they have, for each copy.
        turn: which places.
    """
    if not pairs:
        return True
    (address, length), held = pairs.buffer_info(), torch.empty(1, dtype=torch.int64)
    call("decode", "copies_hold", address, length // 3, turn, held)
    return bool(held.item())


def conv_step(x: Tensor, window: Tensor, w: Tensor, bias: Tensor | None, activation: bool) -> Tensor:
    """One token of a convolution as `plait.ops.conv.causal_conv1d_step` defines it; window contiguous."""
    (B, D, taps), y = window.shape, x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    words = (*stored(window), D, taps, y, D, *numbers(w), *numbers(bias), activation)
    run_tape(array("q", record("conv", *words)), B, None, None, None, 0)
    return y.to(x.dtype)


def state_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> Tensor:
    """One token of the recurrence as `plait.ops.ssd.selective_state_update` defines it; state contiguous."""
    (H, P, N), G = state.shape[1:], B.shape[1]
    rows = torch.cat([x.flatten(1), B.flatten(1), C.flatten(1)], 1).float()
    dt, y = dt.float().contiguous(), torch.empty(x.shape)
    words = (*stored(state), H, P, N, G, rows, dt, rows.shape[1], H, *numbers(A), *numbers(D), *numbers(dt_bias), 0)
    run_tape(array("q", record("state", *words, *map(float, dt_limit), y)), len(x), None, None, None, 0)
    return y.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attention of one query (B, 1, H, P) over k, v (B, S, K, P) that lie as (B, K, room, P)."""
    (B, _, H, P), (S, K) = q.shape, k.shape[1:3]
    rows, y = q.float().contiguous(), torch.empty(q.shape)
    parts, seen = (torch.empty(B, n) for n in spans(H, P))
    half = int(k.dtype == torch.bfloat16)
    kv = (k, half, k.stride(2) // P, v, half, v.stride(2) // P, K, P)
    merged = (SOURCES["merge"], parts, seen, 0, 0, H * P, P, 0, 0, 0, 0.0, y)
    words = array("q", record("attend", *kv, rows, H, parts, seen) + record("copy", *merged))
    run_tape(words, B, None, None, None if key_mask is None else key_mask.contiguous(), S)
    return y.to(q.dtype)


def spans(H: int, P: int) -> tuple[int, int]:
    """Numbers per sequence that attention needs: sums of the spans of keys of H heads, and what was seen there."""
    return H * MOST_SPANS * (-(-P // LANES) * LANES), H * MOST_SPANS * 2


def stored(t: Tensor) -> tuple[Word, ...]:
    """A tensor that a cache holds: address, whether it is bfloat16, its third size."""
    return t, int(t.dtype == torch.bfloat16), t.shape[2]


def numbers(t: Tensor | None) -> tuple[Word, ...]:
    """A small parameter: address, and whether it is bfloat16."""
    return (0, 0) if t is None else (t, int(t.dtype == torch.bfloat16))


def _word(x: Word) -> int:
    if isinstance(x, Tensor):
        return x.data_ptr()
    if isinstance(x, float):
        return struct.unpack("q", struct.pack("d", x))[0]
    return 0 if x is None else int(x)
