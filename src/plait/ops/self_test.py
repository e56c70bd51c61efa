"""Does this device round as it should? Asked once, before a training in few bits begins.

A broken kernel does not crash: it returns zeros, or always rounds down, and the loss is worse weeks later. So every
quantiser that would run here is asked to break ties to even, to keep the mean when it rounds at random, and to give the
reference's bits for numbers of every size.

    |mean of N random roundings of x - x| <= 5 step sqrt(p (1 - p) / N),    p the distance from the lower neighbour
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from plait.ops.dispatch import BackendError, use
from plait.ops.fp8 import quantize_fp8
from plait.ops.hadamard import SIGNS
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import quantize_nvfp4
from plait.ops.operand import operand

# x of a tensor whose scale is 1, halfway between two numbers of the element -> the one whose last bit is 0
TIES = {
    "e2m1": {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0},
    "e4m3": {17.0: 16.0, 19.0: 20.0, 1.0625: 1.0, 1.1875: 1.25, 2.0**-10: 0.0, 3 * 2.0**-10: 2.0**-8},
    "e5m2": {9.0: 8.0, 11.0: 12.0, 1.125: 1.0, 1.375: 1.5, 2.0**-17: 0.0, 3 * 2.0**-17: 2.0**-15},
}
# the largest number of a tensor whose scale is 1: of the element, and in NVFP4 times the largest scale
LARGEST = {"e2m1": 6.0 * 448.0, "e4m3": 448.0, "e5m2": 57344.0}
DRAWS, SIGMAS = 4096, 5.0


def self_test(device: torch.device | str = "cpu") -> None:
    """Try every quantiser on a device, once per process; some milliseconds.

    Raises: BackendError saying what was asked, what was expected and what was seen.
    """
    _self_test(str(torch.device(device)))


@functools.cache
def _self_test(device: str) -> None:
    for element in TIES:
        _breaks_ties_to_even(element, device)
        _keeps_the_mean(element, device)
    _gives_the_references_bits(device)


def _breaks_ties_to_even(element: str, device: str) -> None:
    x = torch.tensor([value * sign for value in TIES[element] for sign in (1.0, -1.0)])
    expected = [value * sign for value in TIES[element].values() for sign in (1.0, -1.0)]
    seen = _rounded(x, element, None, device)
    for given, want, got in zip(x.tolist(), expected, seen.tolist(), strict=True):
        if not got == want:
            _fail(device, f"{given} halfway between two {element} numbers must become {want}, whose last bit is 0", got)


def _keeps_the_mean(element: str, device: str) -> None:
    # a quarter and seven eighths of the way from 2 to 3, or the like, and far below the smallest number
    low, high = {"e2m1": (2.0, 3.0), "e4m3": (16.0, 18.0), "e5m2": (8.0, 10.0)}[element]
    for p in (0.25, 0.875):
        x = low + p * (high - low)
        seen = _rounded(torch.full((DRAWS,), -x), element, 20261121, device)
        if not bool(((seen == -low) | (seen == -high)).all()):
            values = seen.unique().tolist()[:6]
            _fail(device, f"{-x} rounded at random to {element} must become {-low} or {-high}", values)
        mean, sigma = -seen.double().mean().item(), (high - low) * math.sqrt(p * (1 - p) / DRAWS)
        if not abs(mean - x) <= SIGMAS * sigma:
            _fail(device, f"{DRAWS} random roundings of {x} to {element} must have that mean within {sigma:.1g}", mean)


def _rounded(x: Tensor, element: str, seed: int | None, device: str) -> Tensor:
    """x as a quantiser reads it back, of a tensor in which every scale is 1."""
    # a block of its own for the largest number; in E2M1 each other block has a 6
    blocks = x.new_zeros(-(-len(x) // 15) + 1, 16)
    blocks[:-1, :15] = torch.nn.functional.pad(x, (0, -len(x) % 15)).view(-1, 15)
    blocks[:-1, 15] = 6.0 if element == "e2m1" else 0.0
    blocks[-1, 0] = LARGEST[element]
    block, scale = ((1, 16), "e4m3") if element == "e2m1" else (None, "float32")
    values, descale = operand(blocks.to(device), element=element, block=block, scale=scale, seed=seed)  # type: ignore[arg-type]
    return (values.float() * descale).cpu()[:-1, :15].flatten()[: len(x)]


def _gives_the_references_bits(device: str) -> None:
    # 64 x 128: numbers of sizes from 2^-20 to 2^20, rows apart
    i = torch.arange(64 * 128, dtype=torch.float32).view(64, 128)
    x = torch.sin(i * 1.7) * torch.exp2((i[:, :1] / 128 * 17) % 41 - 20)
    for name, compute in _quantisers().items():
        for dtype in (torch.float32, torch.bfloat16):
            seen = compute(x.to(device, dtype))
            with use("reference"):
                expected = compute(x.to(dtype))
            for what, a, b in zip(("codes", "scales", "amax"), seen, expected, strict=False):
                a, b = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (a.cpu(), b))
                n = int((a != b).sum())
                if n:
                    _fail(
                        device, f"{what} of {name} ({dtype}) must be the reference's bits", f"{n} of {b.numel()} differ"
                    )


def _quantisers() -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    return {
        "fp8": lambda x: quantize_fp8(x),
        "fp8 gradients": lambda x: quantize_fp8(x, "e5m2", seed=7),
        "fp8 tiles": lambda x: quantize_fp8(x, block=(1, 128), power_of_two=True),
        "mxfp8": lambda x: quantize_mx(x),
        "mxfp4": lambda x: quantize_mx(x, "e2m1", seed=7),
        "nvfp4": lambda x: quantize_nvfp4(x),
        "nvfp4 weights": lambda x: quantize_nvfp4(x, block=(16, 16)),
        "nvfp4 gradients": lambda x: quantize_nvfp4(x, hadamard=SIGNS, seed=7, transposed=True),
    }


def _fail(device: str, expected: str, seen: object) -> None:
    raise BackendError(
        f"{device} rounds wrongly: {expected}, but it gave {seen}. Do not train in few bits here: choose precision "
        "'bf16', or run `make native` again (on a GPU, another version of Triton) and report this"
    )
