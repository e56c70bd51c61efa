"""The causal convolution against torch's own, its step form, document starts and windows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.conv import causal_conv1d, causal_conv1d_step, conv_window
from plait.ops.dispatch import use


def _inputs(L: int, W: int = 4, B: int = 2, D: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((B, L, D), (D, W), (D,)))  # type: ignore[return-value]


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("L", [1, 2, 63])
def test_equals_a_padded_grouped_convolution(L: int, W: int) -> None:
    x, w, bias = _inputs(L, W)
    theirs = F.conv1d(F.pad(x.transpose(1, 2), (W - 1, 0)), w[:, None], bias, groups=5)
    torch.testing.assert_close(causal_conv1d(x, w, bias), F.silu(theirs).transpose(1, 2))
    torch.testing.assert_close(causal_conv1d(x, w, bias, activation=False), theirs.transpose(1, 2))


def test_every_gradient_is_right_with_starts_and_a_window() -> None:
    x, w, bias = _inputs(7)
    initial = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    starts = torch.rand(2, 7) < 0.3
    assert torch.autograd.gradcheck(
        lambda x, w, b, i: causal_conv1d(x, w, b, initial=i, starts=starts), (x, w, bias, initial)
    )


def test_blocks_of_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.kernels.eager.conv.BLOCK", 1)  # the smallest: 16 tokens
    x, w, bias = _inputs(37)
    starts = torch.rand(2, 37) < 0.2
    whole, inputs = [], (x, w, bias)
    for backend in ("reference", "eager"):
        with use(backend):
            y = causal_conv1d(x, w, bias, starts=starts)
        whole.append((y, *torch.autograd.grad((y * y).sum(), inputs)))
    for a, b in zip(*whole, strict=True):
        torch.testing.assert_close(a, b)


def test_a_document_never_sees_the_one_before() -> None:
    x, w, bias = _inputs(20)
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 0] = starts[0, 7] = starts[1, 3] = starts[1, 4] = True
    y = causal_conv1d(x, w, bias, starts=starts)
    for row, edges in ((0, [0, 7, 20]), (1, [0, 3, 4, 20])):
        for a, b in zip(edges, edges[1:], strict=False):
            torch.testing.assert_close(y[row : row + 1, a:b], causal_conv1d(x[row : row + 1, a:b], w, bias))


def test_steps_and_pieces_equal_one_pass() -> None:
    x, w, bias = (t.detach() for t in _inputs(23))
    whole = causal_conv1d(x, w, bias)
    window, out = torch.zeros(2, 5, 4, dtype=torch.double), []
    for piece in x[:, :17].split((1, 2, 9, 5), dim=1):
        out.append(causal_conv1d(piece, w, bias, initial=window))
        window = conv_window(piece, 4, initial=window)
    for t in range(17, 23):
        out.append(causal_conv1d_step(x[:, t], window, w, bias)[:, None])
    torch.testing.assert_close(torch.cat(out, 1), whole)
    torch.testing.assert_close(window, x[:, -4:].transpose(1, 2))


def test_the_window_holds_the_last_real_tokens_of_each_row() -> None:
    x = torch.arange(1.0, 7).view(1, 6, 1).repeat(4, 1, 1)
    mask = torch.tensor([[1] * 6, [0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0] * 6]).bool()
    before = torch.tensor([-4.0, -3.0, -2.0, -1.0]).view(1, 1, 4).repeat(4, 1, 1)
    before[1] = 0
    window = conv_window(x, 4, initial=before, mask=mask)[:, 0]
    assert window.tolist() == [[3, 4, 5, 6], [0, 0, 5, 6], [-2, -1, 1, 2], [-4, -3, -2, -1]]
