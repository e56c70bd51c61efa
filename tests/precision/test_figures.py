"""Figures of rounding, against counts made by hand."""

import torch
from torch import Tensor

from plait.precision.format import LinearFormat
from plait.precision.linear import Linear
from plait.precision.papers import NV4, TENSORWISE
from plait.precision.ternary import BITLINEAR


def seen(form: LinearFormat, x: Tensor, w: Tensor, dy: Tensor) -> dict[str, float]:
    layer, found = Linear(w.shape[1], w.shape[0], number_format=form), {}
    layer.weight.data.copy_(w)
    layer.watch = lambda name, value: found.__setitem__(name, float(value))
    layer(x.requires_grad_()).backward(dy)
    return found


def test_what_underflows_is_counted() -> None:
    x, w, dy = torch.zeros(4, 16), torch.ones(16, 16), torch.ones(4, 16)
    x[0, :4] = torch.tensor([448.0, 2.0**-9, 2.0**-11, -(2.0**-12)])
    dy[0, 0] = 57344.0
    dy[1, :8] = 2.0**-20
    found = seen(TENSORWISE, x, w, dy)
    assert (found["x.amax"], found["x.underflow"], found["x.saturation"]) == (448.0, 0.5, 0.0)
    assert (found["w.amax"], found["w.underflow"]) == (1.0, 0.0)
    assert (found["dy.amax"], found["dy.underflow"]) == (57344.0, 8 / 64)


def test_what_saturates_is_counted() -> None:
    x, w, dy = torch.ones(2, 32), torch.ones(16, 32), torch.ones(2, 16)
    # the tensor's own scale is 1, so the last block's is e4m3(6 * 17 / 6): 17 rounds to the even 16
    x[0, 0], x[1, 16:] = 2688.0, 1.0
    x[1, 16], x[1, 17] = 6 * 17.0, 6 * 16.9
    found = seen(NV4, x, w, dy)
    # both lie above 6 * 16
    assert found["x.saturation"] == 2 / 64
    # ones beside 2688 in a block of scale 448 become zero, and so do those in the block of scale 16
    assert found["x.underflow"] == (15 + 14) / 64


def test_nobody_watching_changes_nothing_and_ternary_is_watched_too() -> None:
    x, w, dy = torch.randn(8, 16), torch.randn(16, 16), torch.randn(8, 16)
    found = seen(BITLINEAR, x.clone(), w, dy)
    assert found["w.underflow"] > 0.2 and found["x.amax"] == float(x.abs().amax()) and "dy.amax" in found
    plain = Linear(16, 16, number_format=BITLINEAR)
    plain.weight.data.copy_(w)
    watched = Linear(16, 16, number_format=BITLINEAR)
    watched.weight.data.copy_(w)
    watched.watch = lambda name, value: None
    assert torch.equal(plain(x), watched(x))
