"""RMS norms against a float64 evaluation of their formulae."""

import pytest
import torch

from plait.ops.norm import gated_rmsnorm, rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 24), (3, 5, 129)], ids=str)
def test_rms_norm_equals_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w = torch.randn(shape, dtype=dtype), torch.randn(shape[-1])
    exact = w.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    got = rms_norm(x, w, eps=1e-3)
    assert got.dtype == dtype
    # one rounding to dtype at the end, a few of float32 before it
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_gated_norm_gates_first_and_normalises_each_group(groups: int, dtype: torch.dtype) -> None:
    x, z, w = torch.randn(2, 7, 24, dtype=dtype), torch.randn(2, 7, 24, dtype=dtype), torch.randn(24)
    u = x.double() * z.double() * z.double().sigmoid()
    exact = torch.empty_like(u)
    for part in torch.arange(24).chunk(groups):
        rms = (u[..., part].square().mean(-1, keepdim=True) + 1e-5).sqrt()
        exact[..., part] = u[..., part] / rms * w[part].double()
    got = gated_rmsnorm(x, z, w, groups=groups)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_norms_have_right_gradients() -> None:
    x, z = (torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True) for _ in range(2))
    w = torch.randn(12, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w), (x, w))
    assert torch.autograd.gradcheck(lambda x, z, w: gated_rmsnorm(x, z, w, groups=3), (x, z, w))


def test_groups_that_do_not_divide_are_refused() -> None:
    t = torch.randn(1, 1, 10)
    with pytest.raises(ValueError, match="groups=3 does not divide D=10"):
        gated_rmsnorm(t, t, torch.ones(10), groups=3)
