"""The whole way on a tiny teacher: every stage runs once, resumes, and gives the same student to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import config, equal, weights
from tests.train.tiny import objective, tiny_model, write_documents

from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs, Load
from plait.compress.distill import Data, Rows
from plait.compress.job import Job, Long, Scoring, Teaching
from plait.compress.local import Lessons
from plait.compress.pipeline import Compression
from plait.compress.roofline import Roofline
from plait.compress.stages import Stages, identity_of
from plait.compress.teacher import Teacher, Tools
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint, load, save
from plait.model.plan import MACHINES
from plait.train.loop import train
from plait.train.metrics import Observer

ROWS = Rows(seq_len=24, batch_size=4)
JOB = Job(
    budget=Budget(params=22_000),
    load=Load(context=256),
    device="a10g",
    keep=2,
    ranking=2,
    candidates=6,
    scoring=Scoring(batches=2, layer_batches=1),
    teaching=Teaching(
        tokens=20 * ROWS.tokens, short=4 * ROWS.tokens, precision="fp32", rows=ROWS, validation_batches=2, save_every=2
    ),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, words: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model = tiny_model("M-*-M-")
    train(model, objective(words), config(steps=20))
    save(model, folder, format="native")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, words: Dataset) -> Data:
    return Data(train=words, valid=write_documents(tmp_path_factory.mktemp("valid") / "data", 40, seed=1))


def compression(job: Job, teacher: Path, data: Data, out: Path, tools: Tools | None = None) -> Compression:
    costs = Costs(load=job.load, numbers=job.numbers, clock=Roofline(machine=MACHINES["a10g"]))
    held = Teacher(checkpoint=Checkpoint.open(teacher), identity=identity_of(teacher), recipe=job.teaching.teacher)
    return Compression(job, held, data, costs, Stages(out), tools)


def found(last: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((last / "verify.json").read_text())["models"]}


def student_of(last: Path) -> Path:
    inputs = json.loads((last / "stage.json").read_text())["inputs"]
    return last.parent / inputs["student"] / "model"


def test_from_a_teacher_and_a_budget_to_a_student(teacher: Path, data: Data, tmp_path: Path) -> None:
    last = compression(JOB, teacher, data, tmp_path).run()
    rows = found(last)
    assert set(rows) == {"teacher", "student", "depth", "width", "magnitude", "random"}
    assert all(row["costs"]["params"] <= 22_000 for name, row in rows.items() if name != "teacher")
    assert rows["teacher"]["agreement"] == 1 and 0.2 < rows["student"]["agreement"] < 1
    assert rows["student"]["validation_loss"] < rows["teacher"]["validation_loss"] + 0.5
    assert all(row["measured"]["decode_s"] > 0 for row in rows.values())
    model = load(student_of(last))
    assert model.config.cost().params == rows["student"]["costs"]["params"]
    # nothing is made twice
    again = compression(JOB, teacher, data, tmp_path)
    assert again.run() == last and not any(made for *_, made in again.stages.ran)
    kinds = {name.rpartition("-")[0].partition("-")[0] for name, *_ in again.stages.ran}
    assert kinds == {"profile", "score", "search", "realise", "short", "choose", "distil", "verify"}


class Killed(Observer):
    """Stops the process's work at the n-th step that it sees, wherever that is."""

    def __init__(self, left: list[int]) -> None:
        self.left = left

    def step(self, facts: object) -> None:
        self.left[0] -= 1
        if not self.left[0]:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


def test_stopped_in_every_training_it_ends_with_the_same_student(teacher: Path, data: Data, tmp_path: Path) -> None:
    job = replace(JOB, baselines=("depth",), keep=2)
    whole = compression(job, teacher, data, tmp_path / "whole").run()
    stops, last = 0, None
    while last is None:
        left = [7]
        tools = Tools(observe=lambda steps, left=left: [Killed(left)])
        try:
            last = compression(job, teacher, data, tmp_path / "torn", tools).run()
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    assert equal(weights(load(student_of(whole))), weights(load(student_of(last))))
    assert last.name == whole.name


def test_answers_streams_and_longer_rows(teacher: Path, data: Data, tmp_path: Path) -> None:
    teaching = replace(
        JOB.teaching, top=8, long=Long(rows=Rows(seq_len=48, batch_size=2), share=0.2), teacher="int8-32"
    )
    job = replace(JOB, teaching=teaching, baselines=("scratch",), keep=1)
    work = compression(job, teacher, data, tmp_path)
    last = work.run()
    assert {"teacher", "student", "scratch"} == set(found(last))
    kinds = [name.rpartition("-")[0] for name, *_ in work.stages.ran]
    assert "answers" in kinds and "extend" in kinds and "distil-scratch" in kinds
    assert found(last)["student"]["validation_loss"] < found(last)["scratch"]["validation_loss"]
    streams = replace(JOB, teaching=replace(JOB.teaching, streams=0.5), baselines=(), keep=1)
    other = compression(streams, teacher, data, tmp_path)
    assert found(other.run())["student"]["agreement"] > 0.3
    # what does not depend on the way of teaching is there already
    assert {name for name, _, made in other.stages.ran if not made} >= {
        name for name, *_ in work.stages.ran if name.startswith(("profile", "score"))
    }


@pytest.mark.slow
def test_a_choice_per_layer(teacher: Path, data: Data, tmp_path: Path) -> None:
    job = replace(JOB, method="puzzle", lessons=Lessons(steps=4), baselines=())
    work = compression(job, teacher, data, tmp_path)
    rows = found(work.run())
    assert rows["student"]["costs"]["params"] <= 22_000
    tight = replace(job, budget=Budget(params=16_000))
    other = compression(tight, teacher, data, tmp_path)
    assert found(other.run())["student"]["costs"]["params"] <= 16_000
    assert any(name.startswith("library") and not made for name, _, made in other.stages.ran)


@pytest.mark.parametrize("method", ["minipuzzle", pytest.param("puzzle", marks=pytest.mark.slow)])
def test_an_impossible_budget_says_what_is_possible(teacher: Path, data: Data, tmp_path: Path, method: str) -> None:
    job = replace(JOB, method=method, budget=Budget(params=100), lessons=Lessons(steps=1))
    with pytest.raises(BudgetError, match=r"params.*nearest|nearest.*params"):
        compression(job, teacher, data, tmp_path).run()
    assert torch.get_num_threads() >= 1
