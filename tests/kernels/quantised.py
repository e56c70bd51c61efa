"""What the tests of every backend's quantisers share: matrices, and the demand for the reference's bits."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.fp8 import quantize_fp8
from plait.ops.hadamard import SIGNS
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import quantize_nvfp4
from plait.ops.operand import BLOCKS, ELEMENTS

KINDS = ("normal", "outliers", "ties", "decades", "subnormal")
OTHER_SIGNS = tuple(1 if i * i % 7 < 3 else -1 for i in range(16))
FORMATS = [(e, s, b) for e, scales in ELEMENTS.items() for s in scales for b in BLOCKS[s]]
# the operands that kernels make at once; the others are made in parts, by the reference's own steps
FUSED = [(e, s, b) for e, s, b in FORMATS if b != "row" and (s != "float32" or b is None)]
Compute = Callable[[], object]


def numbers(rows: int, columns: int, dtype: torch.dtype, kind: str = "outliers") -> Tensor:
    """A matrix whose blocks differ in size, with zeros, minus zeros and whole blocks of zeros."""
    x = torch.randn(rows, columns)
    if kind == "outliers":
        x *= torch.exp(3 * torch.randn(rows, 1)) * torch.exp(torch.randn(columns))
    elif kind == "ties":
        x = (x * 8).round() / 4
    elif kind == "decades":
        x *= 10.0 ** torch.randint(-36, 30, (rows, 1))
    elif kind == "subnormal":
        x *= 1e-39
    x.view(-1)[torch.randperm(x.numel())[: x.numel() // 9]] = 0
    x.view(-1)[torch.randperm(x.numel())[: x.numel() // 17]] = -0.0
    x[: rows // 3, : columns // 2] = 0
    return x.to(dtype)


def require_same(backend: str, compute: Compute) -> None:
    """The same tensors, bit for bit, from a backend and from the reference; NaN equals NaN."""
    with use(backend):
        ours = compute()
    with use("reference"):
        theirs = compute()
    pairs = (
        zip(ours, theirs, strict=True) if isinstance(ours, tuple) and isinstance(theirs, tuple) else [(ours, theirs)]
    )
    for a, b in pairs:
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        assert a.shape == b.shape and a.dtype == b.dtype
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        equal = a.contiguous().view(bits) == b.contiguous().view(bits)
        if a.is_floating_point():
            a, b = a.float(), b.float()
            # subnormal bfloat16 numbers are zeros to the processors' own instructions
            tiny = (a.abs() < 2.0**-126) & (b.abs() < 2.0**-126) if bits == torch.int16 else torch.zeros(())
            equal |= (a.isnan() & b.isnan()) | tiny.bool()
        assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ"


def cases_of_others(shared: Path) -> Iterator[tuple[str, Compute]]:
    """Every input for which other packages' answers are stored (the references are held to these), in every format."""
    for file in ("nvfp4_1d", "nvfp4_2d", "nvfp4_rht", "mx", "fp8_current_scaling"):
        with safe_open(shared / "vectors" / f"{file}.safetensors", "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name.endswith(".x"):
                    for what, compute in _in_formats(file, stored.get_tensor(name)):
                        yield f"{file} {name} {what}", compute


def _in_formats(file: str, x: Tensor) -> Iterator[tuple[str, Compute]]:
    if file == "mx":
        for element in ("e4m3", "e5m2", "e2m1"):
            yield element, lambda element=element: quantize_mx(x, element)
    elif file == "fp8_current_scaling":
        for element in ("e4m3", "e5m2"):
            for power in (False, True):
                yield f"{element} {power}", lambda e=element, p=power: quantize_fp8(x, e, power_of_two=p)
    else:
        block = (16, 16) if file == "nvfp4_2d" else (1, 16)
        signs = SIGNS if file == "nvfp4_rht" else None
        yield "rows", lambda: quantize_nvfp4(x, block=block)
        yield "columns", lambda: quantize_nvfp4(x, block=block, hadamard=signs, transposed=True)


def random_call(i: int, rng: random.Random, most: tuple[int, int]) -> Compute:
    """A quantiser of the i-th format for a random matrix of at most about these sizes, odd where blocks allow it."""
    element, scale, block = FORMATS[i % len(FORMATS)]
    tile = block if isinstance(block, tuple) else (1, 1)
    rows, columns = (side * rng.randint(1, max(1, limit // side)) for side, limit in zip(tile, most, strict=True))
    dtype, kind = rng.choice((torch.float32, torch.bfloat16)), rng.choice(KINDS)
    seed, transposed = rng.choice((None, rng.getrandbits(63))), rng.random() < 0.5
    if transposed and seed is not None:
        # numbers drawn down columns come four at a time
        columns += -columns % 4
    x = numbers(columns, rows, dtype, kind).mT if transposed else numbers(rows, columns, dtype, kind)
    if scale == "e4m3":
        signs = rng.choice((None, SIGNS, OTHER_SIGNS))
        if transposed and rng.random() < 0.5:
            return lambda: quantize_nvfp4(x.mT, block=block, hadamard=signs, seed=seed, transposed=True)  # type: ignore[arg-type]
        return lambda: quantize_nvfp4(x, block=block, hadamard=signs, seed=seed)  # type: ignore[arg-type]
    if scale == "e8m0":
        return lambda: quantize_mx(x, element, seed=seed)  # type: ignore[arg-type]
    return lambda: quantize_fp8(x, element, block=block, power_of_two=scale == "pow2", seed=seed)  # type: ignore[arg-type]
