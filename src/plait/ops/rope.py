"""Rotary position embedding, with the frequency scalings of the published models.

    angle(t, i) = t * w_i,   w_i = base^(-2i / d),   (x_i, x_{i + d/2}) rotated by the angle

Shapes   B batch, L time, H heads, P head size, d <= P the rotated part.
Numbers  angles, sines and cosines in float32, the product too, result in x.dtype.
Source   Su et al. 2021, arXiv:2104.09864 (pairs i and i + d/2, "rotate half"); Llama 3.1's piecewise scaling as in the
         published configs; YaRN: Peng et al. 2023, arXiv:2309.00071 sections 3.2 to 3.4.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.ops.dispatch import Op, triton_serves


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Which rotation an attention layer applies to its queries and keys.

    base: wavelength base, `rope_theta` in published configs.
    rotated: share of the head that is rotated (1.0 all of it); the rest passes unchanged.
    scaling: how frequencies are stretched beyond `original_context` tokens; "none" leaves them.
    stretch: how many times longer the context becomes.
    low, high: wavelength bounds of "llama3" (low_freq_factor, high_freq_factor), rotations of "yarn".
    temperature: multiplies cosines and sines under "yarn"; None is the paper's 0.1 ln(stretch) + 1.
    """

    base: float = 10000.0
    rotated: float = 1.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    stretch: float = 1.0
    original_context: int = 8192
    low: float = 1.0
    high: float = 4.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        for field in ("base", "rotated", "stretch", "original_context"):
            if not getattr(self, field) > 0:
                raise ValueError(f"rope {field}={getattr(self, field)}: must be more than 0")
        if self.scaling in ("llama3", "yarn") and not 0 < self.low < self.high:
            raise ValueError(f"rope low={self.low}, high={self.high}: must be positive, the second the larger")


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angular speed of each rotated pair, and the temperature of the rotation.

    Args:
        rope: the rotation.
        head_dim: P, channels of a head.

    Returns: (d / 2,) float32 radians per token, and the number that multiplies cosines and sines.
    Raises: ValueError if the rotated part is not an even number of channels.
    """
    d = int(head_dim * rope.rotated)
    if d % 2 or d == 0:
        raise ValueError(f"rope rotates {d} of {head_dim} channels; give a share `rotated` that makes an even number")
    w = rope.base ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
    if rope.scaling == "linear":
        return w / rope.stretch, 1.0
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / w
        keep = (rope.original_context / wavelength - rope.low) / (rope.high - rope.low)
        keep = keep.clamp(0, 1)
        return keep * w + (1 - keep) * w / rope.stretch, 1.0
    if rope.scaling == "yarn":

        def pair_with(rotations: float) -> float:
            """Index of the pair that turns this often over the original context."""
            return d * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

        first = max(math.floor(pair_with(rope.high)), 0)
        last = min(math.ceil(pair_with(rope.low)), d - 1)
        ramp = ((torch.arange(d // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
        temperature = rope.temperature if rope.temperature is not None else 0.1 * math.log(rope.stretch) + 1.0
        return w * (1 - ramp) + w / rope.stretch * ramp, temperature
    return w, 1.0


@Op
def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Turn each pair of channels by its angle at the token's position.

    Args:
        x: (B, L, H, P) queries or keys.
        positions: (B, L) int64 or (1, L), counted from the start of the document.
        frequencies: (d / 2,) float32 from `inverse_frequencies`; channels d and beyond pass unchanged.
        temperature: multiplies the rotated channels.

    Returns: (B, L, H, P) in x.dtype.
    """
    d = 2 * frequencies.shape[0]
    angle = positions[..., None].float() * frequencies  # (B, L, d/2)
    cos, sin = (angle.cos() * temperature)[:, :, None], (angle.sin() * temperature)[:, :, None]
    u, v = x[..., : d // 2].float(), x[..., d // 2 : d].float()
    turned = torch.cat([u * cos - v * sin, v * cos + u * sin], dim=-1).to(x.dtype)
    return turned if d == x.shape[-1] else torch.cat([turned, x[..., d:]], dim=-1)


def _on_triton(x: Tensor, positions: Tensor, frequencies: Tensor, *, temperature: float = 1.0) -> bool:
    fits = x.dtype != torch.float64 and x.numel() > 0 and 0 < 2 * frequencies.shape[0] <= x.shape[3]
    placed = positions.shape in ((x.shape[0], x.shape[1]), (1, x.shape[1]))
    return fits and placed and frequencies.dtype == torch.float32 and triton_serves(x, positions, frequencies)


@rotate.backend("triton", when=_on_triton)
def _(x: Tensor, positions: Tensor, frequencies: Tensor, *, temperature: float = 1.0) -> Tensor:
    from plait.kernels.triton.rope import Rotate

    return Rotate.apply(x, positions, frequencies, temperature, 1)
