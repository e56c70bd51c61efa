"""Shuffles that are the same everywhere and for ever: numbers from hashing, not from a library's generator.

Libraries reserve the right to change what their generators draw; a run that resumes years later must not notice.

Source  Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (the splitmix64 finaliser).
"""

import hashlib

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _scramble(x: np.ndarray) -> np.ndarray:
    # unsigned arrays wrap around silently, which is what the arithmetic wants
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """A 64-bit key that depends on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hashes(count: int, key: int) -> np.ndarray:
    """(count,) uint64: the first numbers of the sequence that belongs to the key; no two are equal."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _scramble(steps + np.uint64(key & _MASK))


def uniform(count: int, key: int) -> np.ndarray:
    """(count,) float64 in [0, 1)."""
    return (hashes(count, key) >> np.uint64(11)) * 2.0**-53


def permutation(count: int, key: int) -> np.ndarray:
    """(count,) int64: the numbers below count in the order that belongs to the key."""
    return np.argsort(hashes(count, key), kind="stable")
