"""The benchmark of quantisers times what it says, at sizes where blocks come out even."""

from plait.cli.benches.few_bits import OPERANDS, few_bits
from plait.cli.benches.sides import require_equal
from plait.model.config import ModelConfig

TINY = ModelConfig.from_pattern("--", name="tiny", vocab_size=96, d_model=64, mlp={"d_ff": 200})


def test_every_case_runs_and_agrees_with_the_reference() -> None:
    cases = list(few_bits(TINY, 20))
    assert len(cases) == len(OPERANDS) + 2
    for case in cases:
        for ours, theirs in case.results():
            require_equal(case.name, ours, theirs, 0.0)
        # bfloat16 numbers and their operands: 2 bytes read and 2 written, at least for 128 rows of 128 columns
        assert case.n_bytes >= 128 * 128 * 2.5
