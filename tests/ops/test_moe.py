"""Routing and experts against a loop over tokens."""

import pytest
import torch

from plait.ops.moe import experts, route


@pytest.mark.parametrize(("n_groups", "n_top"), [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("normalises", [True, False])
def test_routing_equals_its_definition(n_groups: int, n_top: int, normalises: bool) -> None:
    logits, bias = torch.randn(20, 8), torch.randn(8) * 2 - 3  # corrected scores below zero: masking must be -inf
    weights, chosen = route(
        logits, bias, n_chosen=2, n_groups=n_groups, n_top_groups=n_top, normalises=normalises, scale=2.5
    )
    for t in range(20):
        scores = (1 / (1 + (-logits[t]).exp())).tolist()
        corrected = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = 8 // n_groups
        sums = [sum(sorted(corrected[g * size : (g + 1) * size])[-2:]) for g in range(n_groups)]
        allowed = sorted(range(n_groups), key=lambda g: -sums[g])[:n_top]
        ranked = sorted((e for e in range(8) if e // size in allowed), key=lambda e: -corrected[e])[:2]
        assert sorted(chosen[t].tolist()) == sorted(ranked)
        total = sum(scores[e] for e in ranked) if normalises else 1.0
        for e, w in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            assert w == pytest.approx(2.5 * scores[e] / total, rel=1e-5)


def test_experts_equal_a_loop_over_tokens_with_gradients() -> None:
    x, up, down = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((6, 5), (4, 7, 5), (4, 5, 7)))
    chosen = torch.tensor([[0, 1], [1, 0], [3, 1], [3, 0], [1, 3], [0, 3]])  # expert 2 is never chosen
    weights = torch.rand(6, 2, dtype=torch.float32, requires_grad=True)
    loops = [
        sum(weights[t, j] * (down[e] @ (up[e] @ x[t]).relu() ** 2) for j, e in enumerate(chosen[t].tolist()))
        for t in range(6)
    ]
    exact, got = torch.stack(loops), experts(x, weights, chosen, up, down)  # type: ignore[arg-type]
    # results are summed in float32
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, up, down, weights)),
        torch.autograd.grad(exact.sum(), (x, up, down, weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
