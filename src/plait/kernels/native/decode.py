"""Run a tape of decode operations: one call per token for the whole model."""

from array import array

from torch import Tensor

from plait.kernels.native.library import call


def run_tape(words: array, n_words: int, ids: Tensor, positions: Tensor, mask: Tensor | None, n_keys: int) -> None:
    """Run the records (n_words each) of plait.ops.tape.Tape; see decode.cpp."""
    address, length = words.buffer_info()
    call("decode", "run_tape", address, length // n_words, ids.shape[0], ids, positions, mask, n_keys)
