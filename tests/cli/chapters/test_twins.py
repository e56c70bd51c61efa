"""The twins are of one size, and built as the story says."""

from dataclasses import replace

import pytest

from plait.cli.chapters import twins
from plait.cli.chapters.story import FULL, QUICK, Scale


@pytest.mark.parametrize("scale", [FULL, QUICK, replace(FULL, d_model=512, pattern="M-M-M-M*-M-M-M-M*-M-M-")])
@pytest.mark.parametrize("vocab_size", [350, 4096])
def test_parameters_agree_within_one_per_cent(scale: Scale, vocab_size: int) -> None:
    hybrid = twins.hybrid(scale, vocab_size, 2)
    twin = twins.twin(hybrid)
    assert twin.cost().params == pytest.approx(hybrid.cost().params, rel=0.01)
    assert (twin.vocab_size, twin.d_model) == (hybrid.vocab_size, hybrid.d_model)


def test_only_the_twin_has_positions_and_only_the_hybrid_has_states() -> None:
    hybrid = twins.hybrid(FULL, 2048, 2)
    twin = twins.twin(hybrid)
    assert hybrid.pattern == FULL.pattern and set(twin.pattern) == {"*", "-"}
    assert [spec.rope for spec in hybrid.layers if spec.symbol == "*"] == [None]  # type: ignore[attr-defined]
    assert all(spec.rope is not None for spec in twin.layers if spec.symbol == "*")  # type: ignore[attr-defined]
    assert hybrid.cost().ssm_numbers and not twin.cost().ssm_numbers
    assert twin.cost().kv_numbers_per_token == twin.pattern.count("*") * hybrid.cost().kv_numbers_per_token
