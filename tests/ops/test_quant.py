"""BitNet's quantisers against their definition; straight-through gradients."""

import torch

from plait.ops.quant import fake_int8, fake_ternary, quantize_int8, quantize_ternary


def test_ternary_rounds_to_the_mean_magnitude() -> None:
    w = torch.tensor([[0.9, -0.2, 0.5], [-3.0, 0.0, 1.4]])
    codes, descale = quantize_ternary(w)  # mean magnitude is 1.0
    assert descale.item() == 1.0
    assert codes.tolist() == [[1, 0, 0], [-1, 0, 1]], "0.5 rounds to the even neighbour"


def test_int8_reaches_127_at_the_largest_of_each_row() -> None:
    x = torch.tensor([[0.5, -2.0, 1.0], [1e-9, 0.0, 0.0]])
    codes, scale = quantize_int8(x)
    assert codes.tolist() == [[32, -127, 64], [0, 0, 0]]
    assert scale[0].item() == 63.5
    assert (codes / scale - x).abs().max() <= 0.5 / 63.5


def test_gradients_go_straight_through() -> None:
    w = torch.randn(4, 5, requires_grad=True)
    for fake in (fake_ternary, fake_int8):
        (grad,) = torch.autograd.grad((fake(w) * torch.arange(20.0).view(4, 5)).sum(), w)
        assert torch.equal(grad, torch.arange(20.0).view(4, 5))
