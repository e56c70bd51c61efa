"""RMS norms: the plain one before every mixer, and the gated one that ends a Mamba-2 mixer.

    rms_norm         y = w * x / sqrt(mean(x^2) + eps)
    add_rms_norm     t = residual + x;  y = w * t / sqrt(mean(t^2) + eps)
    gated_rmsnorm    u = x * silu(z);  y = w * u / sqrt(mean_g(u^2) + eps)

In the gated norm the gate comes first; `mean_g` runs over one group of D / G channels, so that with tensor parallelism
each rank owns whole groups and no statistic crosses ranks.

Shapes   B batch, L time, D channels, G groups (G divides D).
Numbers  statistics and product in float32, result in x.dtype.
Source   Zhang and Sennrich 2019, arXiv:1910.07467; Dao and Gu 2024, arXiv:2405.21060 section 7.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves, triton_serves


@Op
def rms_norm(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Divide each row by its root mean square, then scale it.

    Args:
        x: (..., D) any float dtype.
        w: (D,) learned scale.
        eps: added to the mean square (not to the root).

    Returns: (..., D) in x.dtype.
    """
    x_f = x.to(torch.promote_types(x.dtype, torch.float32))
    return (w.to(x_f.dtype) * (x_f * torch.rsqrt(x_f.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def _fits_triton(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> bool:
    return x.dtype != torch.float64 and triton_serves(x, w)


@rms_norm.backend("triton", when=_fits_triton)
def _(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> Tensor:
    from plait.kernels.triton.norm import RMSNorm

    return RMSNorm.apply(x, w, eps)


@rms_norm.backend(
    "native",
    when=lambda x, w, *, eps=1e-5: x.is_contiguous() and native_serves("norm", x, w) and w.shape == x.shape[-1:],
)
def _(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> Tensor:
    from plait.kernels.native.norm import RMSNorm

    return RMSNorm.apply(x, w, eps)


@rms_norm.backend("eager", when=lambda *args, **kwargs: True)
def _(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> Tensor:
    from plait.kernels.eager.norm import RMSNorm

    return RMSNorm.apply(x, w, eps)


@Op
def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream, and normalise the stream for the next layer.

    The norm reads the sum as the stream stores it: the result is that of adding and of `rms_norm`, one after the other.

    Args:
        x: (..., D) a layer's output, any float dtype.
        residual: (..., D) the stream before it, any float dtype; often wider than x's.
        w: (D,) learned scale.
        eps: added to the mean square (not to the root).

    Returns: y (..., D) in x.dtype, and the new residual (..., D) in residual.dtype.
    """
    wide = torch.promote_types(x.dtype, residual.dtype)
    total = (residual.to(wide) + x).to(residual.dtype)
    return rms_norm(total.to(wide), w, eps=eps).to(x.dtype), total


@add_rms_norm.backend(
    "triton", when=lambda x, residual, w, *, eps=1e-5: _fits_triton(x, w) and _fits_triton(residual, w)
)
def _(x: Tensor, residual: Tensor, w: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    from plait.kernels.triton.norm import AddRMSNorm

    return AddRMSNorm.apply(x, residual, w, eps)


@Op
def gated_rmsnorm(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float = 1e-5) -> Tensor:
    """Normalise x after gating it by z.

    Args:
        x, z: (B, L, D) mixer output and gate, any float dtype.
        w: (D,) learned scale.
        groups: how many groups share statistics; 1 normalises over all of D.
        eps: added to the mean square (not to the root).

    Returns: (B, L, D) in z.dtype.
    Raises: ValueError if groups does not divide D.
    """
    if x.shape[-1] % groups:
        raise ValueError(f"groups={groups} does not divide D={x.shape[-1]}")
    f32 = torch.promote_types(z.dtype, torch.float32)
    u_BLGP = (x.to(f32) * F.silu(z.to(f32))).unflatten(-1, (groups, -1))
    r_BLG1 = torch.rsqrt(u_BLGP.square().mean(-1, keepdim=True) + eps)
    return (w.to(f32) * (u_BLGP * r_BLG1).flatten(-2)).to(z.dtype)


@gated_rmsnorm.backend(
    "triton",
    when=lambda x, z, w, *, groups, eps=1e-5: x.shape[-1] % groups == 0 and _fits_triton(x, w) and _fits_triton(z, w),
)
def _(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float = 1e-5) -> Tensor:
    from plait.kernels.triton.gated_norm import GatedRMSNorm

    return GatedRMSNorm.apply(x, z, w, groups, eps)


def _fits_native(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float = 1e-5) -> bool:
    from plait.kernels.native.norm import row_stride

    even = x.shape[-1] % groups == 0 and row_stride(x) > 0 and row_stride(z) > 0
    served = even and x.dtype == z.dtype and native_serves("norm", x, z, w)
    return served and x.shape == z.shape and w.shape == x.shape[-1:]


@gated_rmsnorm.backend("native", when=_fits_native)
def _(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float = 1e-5) -> Tensor:
    from plait.kernels.native.norm import GatedRMSNorm

    return GatedRMSNorm.apply(x, z, w, groups, eps)


@gated_rmsnorm.backend("eager", when=lambda x, z, w, *, groups, eps=1e-5: x.shape[-1] % groups == 0)
def _(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float = 1e-5) -> Tensor:
    from plait.kernels.eager.norm import GatedRMSNorm

    return GatedRMSNorm.apply(x, z, w, groups, eps)
