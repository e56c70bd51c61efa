"""Random numbers that depend on a seed and a position alone: the same on every device, rank and recomputation.

    element i = word i % 4 of Philox4x32-10(key = seed, counter = i // 4);      u = (word >> 8) * 2^-24, in [0, 1)

Numbers  32-bit words in int64 tensors; u is float32 and a multiple of 2^-24. The words are those of Triton's
         `tl.randint4x(seed, i // 4)`, so that a kernel can draw them where it needs them.
Source   Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import hashlib
import math
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def uniform(shape: int | tuple[int, ...], *, seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        shape: of the result; element i is the i-th in row-major order.
        seed: 0 <= seed < 2^63, or such a number as a () int64 tensor, which a compiled function does not specialise on.
        device: of the result.

    Returns: float32 of the shape, multiples of 2^-24.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    n = math.prod(shape)
    key = torch.as_tensor(seed, dtype=torch.int64, device=device)
    i = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    words = torch.stack(philox(key, i & _MASK, i >> 32, torch.zeros_like(i), torch.zeros_like(i)), dim=-1)
    return ((words >> 8).float() * 2.0**-24).flatten()[:n].view(shape)


def stream(seed: Word, name: str, step: Word) -> Word:
    """The seed of one tensor's numbers at one step, so that no two tensors or steps share theirs.

    Args:
        seed: of the run, 0 <= seed < 2^63.
        name: of the tensor and of what it is used for, such as "layers.3.out_proj dy".
        step: of the training, 0 <= step < 2^63. With an int64 () tensor for seed and step, so is the result.

    Returns: 0 <= key < 2^63.
    """
    low, high = _name_words(name)
    a, b, _, _ = philox(seed, step & _MASK, step >> 32, step * 0 + low, step * 0 + high)
    return (a & 0x7FFFFFFF) << 32 | b


def philox(key: Word, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words for a 64-bit key and a 128-bit counter, given as four words; ints or int64 tensors."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # an int64 product of two words wraps around, but keeps all of its 64 bits
        b, a = c2 * _ROUND_B, c0 * _ROUND_A
        c0, c2 = ((b >> 32) & _MASK) ^ c1 ^ k0, ((a >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = b & _MASK, a & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _name_words(name: str) -> tuple[int, int]:
    # Python's own hash of a string differs from process to process
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return digest & _MASK, digest >> 32


# what torch.compiler.assume_constant_result does; to call it would import the compiler, 150 MB
_name_words._dynamo_marked_constant = True  # type: ignore[attr-defined]
