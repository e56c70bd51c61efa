"""Numbers in which the memory of sequences is kept: as computed, in fewer bits, rounded at random where that matters.

    bf16, fp32     as they are, to the nearest
    fp16-sr        float16, up or down at random, so that what is added up token by token stays right on average
    int8-sr        whole numbers with one scale for the last dimension, amax / 127, rounded at random
    int8           the same, to the nearest
    fp8            E4M3 without a scale; what is larger than 448 becomes 448

At random:  y = q floor(x / q + u), q the distance of neighbours at x, u uniform in [0, 1);  u = 1/2 is to the nearest.

Numbers  scales in float32. u comes from seeds that callers derive from layer and position: nothing is drawn in turn.
Source   NVIDIA 2026, Nemotron 3 Super, precision of the SSM cache: rounded at random float16 and int8 lose nothing,
         rounded to the nearest 2 to 3 % of accuracy, and answers grow by a tenth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

STATE_FORMS = ("fp32", "bf16", "fp16-sr", "int8-sr")
KV_FORMS = ("auto", "bf16", "fp8", "int8")
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16-sr": torch.float16,
    "int8-sr": torch.int8,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_LARGEST_FP8, _LARGEST_FP16 = 448.0, 65504.0

Index = tuple[Tensor | slice, ...]


class Kept:
    """A tensor in one of these forms; rows of it are read and written by index."""

    def __init__(self, shape: Sequence[int], form: str, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            shape: of the whole; int8 has a scale for each last dimension.
            form: as above, or "auto" for the dtype.
            device, dtype: where, and what is computed in.

        Raises: ValueError for an unknown form.
        """
        if form != "auto" and form not in _DTYPES:
            raise ValueError(f"form={form!r} is unknown; known: auto, {', '.join(_DTYPES)}")
        self.form, self.dtype = form, dtype
        # what is not written is never read: memory nobody uses stays the system's
        self.codes = torch.empty(tuple(shape), dtype=_DTYPES.get(form, dtype), device=device)
        has_scales = self.codes.dtype == torch.int8
        self.scales = torch.empty(tuple(shape)[:-1], device=device) if has_scales else None

    @property
    def is_random(self) -> bool:
        """Whether writing takes seeds."""
        return self.form.endswith("-sr")

    def tensors(self) -> list[Tensor]:
        """Codes and scales, for copying as they are and counting bytes."""
        return [_bytes(self.codes)] if self.scales is None else [self.codes, self.scales]

    def read(self, index: Index) -> Tensor:
        """Rows as numbers, in the dtype."""
        codes = _bytes(self.codes)[index].view(self.codes.dtype).to(self.dtype)
        return codes if self.scales is None else codes * self.scales[index][..., None].to(self.dtype)

    def write(self, index: Index, x: Tensor, seeds: Sequence[int] | None = None) -> None:
        """Write rows x.

        Args:
            index: which.
            x: (rows, ...).
            seeds: one for each row, of what is rounded at random; None rounds to the nearest.
        """
        if self.codes.dtype == torch.int8:
            assert self.scales is not None
            scales = x.float().abs().amax(-1) / 127
            self.scales[index] = scales
            steps = x.float() / scales.masked_fill(scales == 0, 1.0)[..., None]
            self.codes[index] = _rounded(steps, seeds).clamp(-127, 127).to(torch.int8)
        elif self.form == "fp16-sr":
            self.codes[index] = _to_half(x.float(), seeds)
        elif self.form == "fp8":
            _bytes(self.codes)[index] = _bytes(x.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn))
        else:
            self.codes[index] = x.to(self.codes.dtype)


def _bytes(t: Tensor) -> Tensor:
    """Eight-bit floats as bytes, which can be indexed everywhere; others as they are."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def _rounded(x: Tensor, seeds: Sequence[int] | None) -> Tensor:
    if seeds is None:
        return (x + 0.5).floor()
    u = torch.empty_like(x)
    generator = torch.Generator(device=x.device)
    for row, seed in zip(u, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return (x + u).floor()


def _to_half(x: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """float32 to float16; neighbours lie 2^(e - 11) apart below 2^e, and never closer than 2^-24."""
    exponent = (torch.frexp(x).exponent - 11).clamp(min=-24)
    rounded = torch.ldexp(_rounded(torch.ldexp(x, -exponent), seeds), exponent)
    return rounded.clamp(-_LARGEST_FP16, _LARGEST_FP16).to(torch.float16)
