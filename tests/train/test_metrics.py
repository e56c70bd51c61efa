"""What a run tells."""

import io
import json
from pathlib import Path

import pytest
import torch
from tests.train.tiny import objective, tiny_config

from plait.data.loader import Batch
from plait.data.shards import Dataset
from plait.train.metrics import JsonLines, StepFacts, clock, peak_flops_per_s, read_lines, step_flops
from plait.train.progress import Lines


def facts(step: int = 1, **kwargs: object) -> StepFacts:
    plain = {"steps": 10, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 96, "tokens_per_s": 1234.5}
    plain |= {"flops_per_s": 2e9, "utilisation": 0.25, "time_left_s": 61.0}
    return StepFacts(step=step, **(plain | kwargs))  # type: ignore[arg-type]


def test_the_line_says_all_that_is_known() -> None:
    line = facts(skipped=2, validation_loss=2.25).line()
    for words in ("step 1/10", "loss 2.5000", "lr 1.00e-03", "grad 0.50", "1,234 tok/s", "2.0 GFLOP/s (25% of peak)"):
        assert words in line
    assert "1:01 left" in line and "2 skipped" in line and "validation 2.2500" in line


def test_flops_are_three_forwards_with_attention_over_visible_keys_only(words: Dataset) -> None:
    goal = objective(words)
    batch = Batch(
        ids=torch.zeros(1, 6, dtype=torch.long),
        targets=torch.zeros(1, 6, dtype=torch.long),
        starts=torch.tensor([[True, False, False, True, False, False]]),
    )
    size = goal.size(batch)
    # two documents of three tokens: 1 + 2 + 3 keys each
    assert (size.tokens, size.counted, size.keys) == (6, 6, 12)
    config = tiny_config("*-")
    qkvo, keys, mlp, head = 32 * (32 + 16 + 16 + 32), 2 * 32, 2 * 32 * 64, 32 * 64
    assert step_flops(config, 6, 12) == 3 * 2 * (6 * (qkvo + mlp + head) + 12 * keys)


def test_the_measured_peak_is_a_speed_that_computers_have() -> None:
    peak = peak_flops_per_s(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert peak_flops_per_s(torch.device("cpu"), torch.float32) == peak


def test_json_lines_hold_every_step_and_words_for_what_json_lacks(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl", after=0)
    lines.step(facts(1))
    lines.step(facts(1, loss=float("nan"), applied=False))
    lines.close()
    one, two = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert one["loss"] == 2.5 and "validation_loss" not in one
    assert two["loss"] == "nan" and two["applied"] is False


def test_steps_that_a_run_went_back_from_are_not_read(tmp_path: Path) -> None:
    steps = [(1, True), (2, True), (2, False), (3, True), (4, True), (4, False), (2, False), (3, True), (4, True)]
    rows = [{"step": step, "applied": applied, "at": at} for at, (step, applied) in enumerate(steps)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "torn')
    assert [row["at"] for row in read_lines(path)] == [0, 1, 2, 6, 7, 8]
    # samples are taken after updates only, so that nothing else tells of going back
    path.write_text("".join(f'{{"step": {step}, "at": {at}}}\n' for at, step in enumerate((10, 20, 30, 20, 30, 40))))
    assert [row["at"] for row in read_lines(path)] == [0, 3, 4, 5]
    assert read_lines(tmp_path / "nowhere") == []


def test_plain_lines_come_now_and_then_and_for_what_matters() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every_s=3600)
    for step in range(1, 11):
        lines.step(facts(step, validation_loss=2.0 if step == 5 else None))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 1/10", "step 5/10", "step 10/10"]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from plait.train.metrics import TensorBoard

    board = TensorBoard(tmp_path, after=0)
    board.step(facts(1, validation_loss=2.0))
    board.close()
    assert any(b"validation_loss" in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (42, "42 s"), (187, "3:07"), (8100, "2:15:00")])
def test_time_is_said_as_people_say_it(seconds: float, said: str) -> None:
    assert clock(seconds) == said
