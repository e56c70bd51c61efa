"""Packed documents = the documents run one by one: logits, loss and every gradient, in float32, 200 random packings.

The state of the scan, the window of the convolution, attention and positions must all begin anew at a document's first
token. Tolerance 1e-5, relative to the largest entry of each tensor where that exceeds one: the same numbers are summed
in another order.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.model.sizes import ATTENTION, MAMBA, config

from plait.model.hybrid import build
from plait.model.layers.mamba2 import Mamba2

PATTERNS = {
    "hybrid": config("M-M*-ME"),
    "rope": config("M*-", attention=ATTENTION | {"rope": {"base": 50.0}}),
    "mamba": config("MM"),
    "biased": config("M-*", mamba2=MAMBA | {"proj_bias": True, "conv_width": 3}, mlp={"d_ff": 8, "bias": True}),
}


@pytest.mark.parametrize("case", range(200))
def test_packed_equals_one_by_one(case: int) -> None:
    generator = torch.Generator().manual_seed(case)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    name = list(PATTERNS)[case % len(PATTERNS)]
    sizes = PATTERNS[name]
    chunk = (1, 2, 5, 8, 16, 64)[draw(0, 6)]
    layers = tuple(replace(spec, chunk=chunk) if isinstance(spec, Mamba2) else spec for spec in sizes.layers)
    model = build(replace(sizes, layers=layers), recipe="fp32", seed=case)
    rows, L = draw(1, 3), draw(2, 41)
    ids = torch.randint(0, 37, (rows, L), generator=generator)
    starts = torch.rand(rows, L, generator=generator) < (0.02, 0.1, 0.5)[draw(0, 3)]
    starts[:, 0] = True
    targets = torch.randint(0, 37, (rows, L), generator=generator)
    targets[torch.rand(rows, L, generator=generator) < 0.2] = -100

    x, _ = model.hidden(ids, starts=starts)
    packed_logits = x @ model.head_weight.T
    packed = torch.autograd.grad(model.loss_sum(x, targets), list(model.parameters()), allow_unused=True)

    total, logits = torch.zeros(()), torch.empty_like(packed_logits)
    for row in range(rows):
        edges = [*starts[row].nonzero().flatten().tolist(), L]
        for a, b in zip(edges, edges[1:], strict=False):
            x, _ = model.hidden(ids[row : row + 1, a:b])
            logits[row, a:b] = x[0] @ model.head_weight.T
            total = total + F.cross_entropy(x[0] @ model.head_weight.T, targets[row, a:b], reduction="sum")
    alone = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)

    torch.testing.assert_close(packed_logits, logits, rtol=1e-5, atol=1e-5)
    for (parameter, _), g, h in zip(model.named_parameters(), packed, alone, strict=True):
        assert (g is None) == (h is None), parameter
        if g is not None and h is not None:
            error = (g - h).abs().max() / h.abs().max().clamp(min=1.0)
            assert error < 1e-5, f"{name}, chunk {chunk}: gradient of {parameter} differs by {error:.1e}"
