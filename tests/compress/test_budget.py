"""Budgets: the papers' own, to 0.1 GiB, and verdicts that say what is wrong."""

import math

import pytest

from plait.compress.budget import Budget, BudgetError, Verdict
from plait.compress.costs import Costs, LayerCosts, Load
from plait.compress.numbers import Numbers
from plait.compress.roofline import Roofline
from plait.model.config import ModelConfig
from plait.model.plan import GIB, MACHINES

NANO = Costs(load=Load(context=131072))
# what Nemotron-H's MiniPuzzle can only have meant: 4 bits without scales, 8-bit keys and values, 10^6 tokens
PUZZLE = Costs(load=Load(context=10**6), numbers=Numbers(weights=4, kv="fp8", ssm="bf16"))
NVFP4 = Costs(load=Load(context=10**6), numbers=Numbers(weights=4.5, kv="fp8", ssm="bf16"))
NARROW = Costs(load=Load(context=10**6), numbers=Numbers(weights=4.5, kv=4, ssm="bf16"))
# an A10G's 22.06 GiB, less 5 % for safety and 1.3 GiB for a vision encoder (arXiv:2508.14444)
A10G = 22.06 * 0.95 - 1.3
RTX_5090 = 31.7


@pytest.mark.parametrize(
    ("name", "costs", "gib", "limit", "fits"),
    [
        ("nemotron-nano-9b-v2", NANO, 18.7, A10G, True),
        ("nemotron-nano-12b-v2", NANO, 26.1, A10G, False),
        ("nemotron-h-47b", PUZZLE, 31.7, RTX_5090, True),
        ("nemotron-h-56b", PUZZLE, 45.7, RTX_5090, False),
        # with NVFP4's scales the weights are 24.5 GiB, and only 4-bit keys and values fit
        ("nemotron-h-47b", NVFP4, 34.4, RTX_5090, False),
        ("nemotron-h-47b", NARROW, 29.6, RTX_5090, True),
        # a Transformer's keys and values alone are 18 GiB
        ("qwen3-8b", NANO, 33.3, A10G, False),
    ],
)
def test_the_papers_budgets_come_out_to_a_tenth_of_a_gib(
    name: str, costs: Costs, gib: float, limit: float, fits: bool
) -> None:
    config = ModelConfig.preset(name)
    assert round(A10G, 2) == 19.66
    assert costs.total(config).total_bytes / GIB == pytest.approx(gib, abs=0.05)
    verdict = Budget(total_bytes=limit * GIB).verdict(config, costs)
    assert verdict.ok is fits
    assert verdict.by / GIB == pytest.approx(0 if fits else gib - limit, abs=0.05)


def test_the_parts_are_the_papers_too() -> None:
    nano, qwen = (NANO.total(ModelConfig.preset(name)) for name in ("nemotron-nano-9b-v2", "qwen3-8b"))
    assert nano.weight_bytes / GIB == pytest.approx(16.56, abs=0.01)
    assert nano.kv_bytes == 2 * GIB
    assert nano.state_bytes / GIB == pytest.approx(0.13, abs=0.01)
    assert qwen.kv_bytes == 18 * GIB
    large = PUZZLE.total(ModelConfig.preset("nemotron-h-47b"))
    parts = (large.weight_bytes, large.kv_bytes, large.state_bytes)
    assert [part / GIB for part in parts] == pytest.approx([21.79, 9.54, 0.35], abs=0.01)
    assert NVFP4.total(ModelConfig.preset("nemotron-h-47b")).weight_bytes / GIB == pytest.approx(24.5, abs=0.02)


def test_the_first_limit_broken_is_named_with_its_excess() -> None:
    total = LayerCosts(params=100, weight_bytes=3 * GIB, kv_bytes=2 * GIB, prefill_s=0.5, decode_s=0.002)
    verdict = Budget(params=100, weight_bytes=2 * GIB, total_bytes=GIB, decode_s=0.001).judge(total)
    assert verdict == Verdict(ok=False, limit="weight_bytes", value=3 * GIB, ceiling=2 * GIB)
    assert str(verdict) == "weight_bytes 3 GiB exceeds 2 GiB by 1 GiB (50.0%)"
    assert str(Budget(decode_s=0.0015).judge(total)) == "decode_s 2 ms exceeds 1.5 ms by 0.5 ms (33.3%)"
    assert str(Budget(params=99).judge(total)) == "params 100 exceeds 99 by 1 (1.0%)"
    assert Budget(params=100, total_bytes=5 * GIB, prefill_s=0.5).judge(total) == Verdict(ok=True)
    assert str(Verdict(ok=True)) == "within the budget"


def test_a_speedup_becomes_a_ceiling_on_the_teachers_time() -> None:
    costs = Costs(load=Load(context=8192), clock=Roofline(machine=MACHINES["a10g"]))
    teacher = ModelConfig.preset("nemotron-nano-12b-v2")
    total = costs.total(teacher)
    budget = Budget(min_speedup=1.25, min_prefill_speedup=2.0, prefill_s=1e-9).against(total)
    assert budget.ceilings() == {"prefill_s": 1e-9, "decode_s": total.decode_s / 1.25}
    assert budget.min_speedup is None and budget.min_prefill_speedup is None
    at_least = Budget(min_speedup=1.3).against(total)
    assert at_least.verdict(ModelConfig.preset("nemotron-nano-9b-v2"), costs).ok
    verdict = at_least.verdict(teacher, costs)
    assert verdict.limit == "decode_s" and verdict.by == pytest.approx(total.decode_s * (1 - 1 / 1.3))


def test_a_time_without_a_clock_and_a_speedup_without_a_teacher_are_refused() -> None:
    config = ModelConfig.preset("nemotron-h-4b")
    with pytest.raises(ValueError, match="decode_s=0.01 needs a clock"):
        Budget(decode_s=0.01).verdict(config, Costs())
    with pytest.raises(ValueError, match="min_speedup=1.2 needs a clock"):
        Budget(min_speedup=1.2).against(Costs().total(config))
    with pytest.raises(ValueError, match="min_speedup=1.2 means nothing yet"):
        Budget(min_speedup=1.2).verdict(config, Costs())


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "22GiB", True])
def test_a_ceiling_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=f"total_bytes={value!r}: must be a number above 0"):
        Budget(total_bytes=value)  # type: ignore[arg-type]


def test_a_model_outside_the_budget_is_refused_by_name() -> None:
    with pytest.raises(BudgetError, match="nemotron-nano-12b-v2: total_bytes 26.07 GiB exceeds 19.66 GiB by 6.408 GiB"):
        Budget(total_bytes=19.66 * GIB).require(ModelConfig.preset("nemotron-nano-12b-v2"), NANO)
    Budget(total_bytes=19.66 * GIB).require(ModelConfig.preset("nemotron-nano-9b-v2"), NANO)
