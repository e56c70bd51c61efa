"""Compare a fast path with its reference in float64: values and every gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plait.ops.dispatch import use


def outputs_and_gradients(
    f: Callable[..., Tensor], inputs: Sequence[Tensor | None], backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """f's output, and the gradient of a fixed random combination of it, rounded to `dtype`, by each float input."""
    given = [None if t is None else t.detach().clone() for t in inputs]
    wanted = [t.requires_grad_() for t in given if t is not None and t.is_floating_point()]
    with use(backend):
        y = f(*given)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y, wanted, g.to(dtype).to(y), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if d is None else d for t, d in zip(wanted, gradients, strict=True))]


def assert_equals_reference(
    f: Callable[..., Tensor], inputs: Sequence[Tensor | None], *, backend: str = "native", growth: float = 1.0
) -> None:
    """The backend against the reference evaluated in float64 on the same (already rounded) inputs.

    inputs: of about unit size; the first says the dtype. growth: how many roundings of the dtype, relative to the
    largest value of each tensor (at least 1: gradients may cancel), may add up.
    """
    dtype = next(t.dtype for t in inputs if t is not None)
    fast = outputs_and_gradients(f, inputs, backend, dtype)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    exact = outputs_and_gradients(f, wide, "reference", dtype)
    for got, want in zip(fast, exact, strict=True):
        scale = max(float(want.abs().max()), 1.0)
        # sums are kept in float32 whatever the inputs are
        limit = growth * torch.finfo(got.dtype).eps + 64 * torch.finfo(torch.float32).eps
        off = float((got.double() - want).abs().max()) / scale
        assert off <= limit, f"{tuple(got.shape)} {got.dtype}: off by {off:.2e} of the largest value, limit {limit:.2e}"
