"""Tasks: what is asked for each line of a file, how it is graded, and what is said about broken files."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from plait.engine.likelihood import Likelihood
from plait.evals.task import Example, Option, greedy, likeliest, likeliest_per_byte
from plait.evals.tasks import TASKS

LINES = {
    "blimp": {"sentence_good": "A dog barks.", "sentence_bad": "A dog bark.", "UID": "agreement"},
    "lambada": {"context": "He saw the ", "continuation": "cat"},
    "arc_easy": {"query": "Question: What is wet?\n", "choices": ["fire", "water", "sand", "air"], "gold": 1},
    "arc_challenge": {"query": "Question: What is wet?", "choices": ["fire", "water", "sand", "air"], "gold": 1},
    "piqa": {"query": "Question: To open a door\n", "choices": ["push it", "eat it"], "gold": 0},
}
ASKED = {
    "blimp": [("", "A dog barks."), ("", "A dog bark.")],
    "lambada": [("He saw the", " cat")],
    "arc_easy": [("Question: What is wet?\nAnswer:", f" {c}") for c in ("fire", "water", "sand", "air")],
    "arc_challenge": [("Question: What is wet?\nAnswer:", f" {c}") for c in ("fire", "water", "sand", "air")],
    "piqa": [("Question: To open a door\nAnswer:", " push it"), ("Question: To open a door\nAnswer:", " eat it")],
}


def _write(folder: Path, name: str, rows: list[dict], ending: str = "") -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = {".zst": zstandard.compress, ".gz": gzip.compress}.get(ending, bytes)(text)
    (folder / f"{TASKS[name].file}.jsonl{ending}").write_bytes(packed)


def _found(*logprobs: float, greedy: bool = False) -> list[Likelihood]:
    return [Likelihood(logprob=value, tokens=3, greedy=greedy) for value in logprobs]


@pytest.mark.parametrize("ending", ["", ".zst", ".gz"])
@pytest.mark.parametrize("name", TASKS)
def test_a_line_becomes_the_question_that_the_field_asks(name: str, ending: str, tmp_path: Path) -> None:
    _write(tmp_path, name, [LINES[name]], ending)
    (example,) = TASKS[name].examples(tmp_path)
    assert [(option.context, option.continuation) for option in example.options] == ASKED[name]
    assert example.gold == LINES[name].get("gold", 0)
    assert example.group == LINES[name].get("UID", "")
    assert TASKS[name].chance == {"blimp": 0.5, "lambada": 0, "piqa": 0.5}.get(name, 0.25)


def test_grades_compare_sums_bytes_or_first_choices() -> None:
    pair = Example(options=(Option(context="", continuation=" ab"), Option(context="", continuation=" abcd")), gold=1)
    assert likeliest(pair, _found(-2.0, -3.0)).score == 0.0
    assert likeliest(pair, _found(-3.0, -2.0)).score == 1.0
    # -1 and -0.75 per byte
    assert likeliest_per_byte(pair, _found(-2.0, -3.0)).score == 1.0
    # of equals the first is taken, so that a model that finds all alike is no better than chance
    assert likeliest(pair, _found(-2.0, -2.0)).score == 0.0
    assert greedy(pair, _found(-2.0, greedy=True)).score == 1.0
    assert greedy(pair, _found(-2.0)).score == 0.0
    assert TASKS["lambada"].grade is greedy and TASKS["arc_challenge"].grade is likeliest_per_byte


def test_a_limit_draws_the_same_lines_from_the_whole_file(tmp_path: Path) -> None:
    rows = [{"sentence_good": f"good {i}", "sentence_bad": f"bad {i}"} for i in range(100)]
    _write(tmp_path, "blimp", rows)
    task = TASKS["blimp"]
    drawn = [int(e.options[0].continuation.split()[1]) for e in task.examples(tmp_path, 10)]
    assert len(set(drawn)) == 10 and max(drawn) > 50 and drawn == sorted(drawn)
    assert task.examples(tmp_path, 10) == task.examples(tmp_path, 10) != task.examples(tmp_path, 10, seed=1)
    assert len(task.examples(tmp_path, 0)) == len(task.examples(tmp_path, 1000)) == 100


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("blimp", {"sentence_good": "a"}, "line 1 has no field 'sentence_bad', which blimp needs"),
        ("lambada", {"context": "", "continuation": "b"}, "context is '', not a text"),
        ("piqa", {"query": "q", "choices": ["a"], "gold": 0}, "not a list of two texts or more"),
        ("piqa", {"query": "q", "choices": ["a", "b"], "gold": 2}, "gold is 2, not an index into 2 choices"),
        ("arc_easy", {"query": 3, "choices": ["a", "b"], "gold": 0}, "query is 3, not a text"),
    ],
)
def test_a_wrong_line_is_named(name: str, row: dict, words: str, tmp_path: Path) -> None:
    _write(tmp_path, name, [row])
    with pytest.raises(ValueError, match=words):
        TASKS[name].examples(tmp_path)


def test_a_missing_folder_file_or_content_is_named(tmp_path: Path) -> None:
    task = TASKS["piqa"]
    with pytest.raises(ValueError, match="is no folder; give the one with piqa.jsonl"):
        task.examples(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"needs piqa.jsonl .* it has no .jsonl files"):
        task.examples(tmp_path)
    _write(tmp_path, "blimp", [LINES["blimp"]])
    with pytest.raises(ValueError, match="it has blimp"):
        task.examples(tmp_path)
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"piqa.jsonl is empty"):
        task.examples(tmp_path)
    (tmp_path / "piqa.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"piqa.jsonl, line 1 is no example of piqa"):
        task.examples(tmp_path)
    (tmp_path / "lambada_openai.jsonl.zst").write_bytes(zstandard.compress(b"x" * 999)[:-5])
    with pytest.raises(ValueError, match="corrupt or cut short"):
        TASKS["lambada"].examples(tmp_path)
