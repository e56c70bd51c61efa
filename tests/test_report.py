"""Facts keep their numbers on the way to a table, a file and a comparison."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.report import Fact, Report, provenance

HERE = {"commit": "abc", "device": "abacus"}


def report(title: str, *facts: Fact) -> Report:
    return Report(title, list(facts), HERE)


def test_a_table_lines_up_names_numbers_units_and_spread() -> None:
    speed = report("speed")
    speed.add("decode", 1234.5678, "tokens/s", n=5, spread=1.5)
    speed.add("parameters", 8_101_000_000)
    speed.add("fits", True)
    assert speed.table().splitlines() == [
        "speed",
        "  decode              1,235 tokens/s  ± 1.5 (n=5)",
        "  parameters  8,101,000,000",
        "  fits                  yes",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.0001234"), (0.0, "0"), (12345.6, "12,346"), (1e20, "1e+20"), (None, "-"), (math.nan, "nan")],
)
def test_numbers_are_shown_to_four_digits(value: float | None, text: str) -> None:
    assert report("", Fact("x", value)).table().split()[-1] == text


def test_a_file_gives_back_the_same_report(tmp_path: Path) -> None:
    one = report("loss é", Fact("loss", 2.5, "nats/token", 3, 0.1), Fact("word", "nan?"), Fact("nan", math.inf))
    one.save_jsonl(tmp_path / "new" / "a.jsonl")
    assert Report.load_jsonl(tmp_path / "new" / "a.jsonl") == one
    assert os.listdir(tmp_path / "new") == ["a.jsonl"]


def test_every_line_of_a_file_is_plain_json(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    report("a", Fact("x", math.nan), Fact("y", -math.inf, spread=1.0)).save_jsonl(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    head, x, y = (json.loads(line, parse_constant=refuse) for line in lines)
    assert head == {"title": "a", "provenance": HERE}
    assert (x["value"], y["value"], y["spread"]) == ("nan", "-inf", 1.0)


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report("old").save_jsonl(tmp_path / "a.jsonl")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report("new").save_jsonl(tmp_path / "a.jsonl")
    assert Report.load_jsonl(tmp_path / "a.jsonl").title == "old"
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"title": "a"}', '{"title": "a", "provenance": {}}\n{"x": 1}'])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="a.jsonl is not a report"):
        Report.load_jsonl(tmp_path / "a.jsonl")


def test_a_comparison_gives_ratios_with_their_spread() -> None:
    fast = report("fast", Fact("speed", 30.0, "tokens/s", 5, 3.0), Fact("loss", 2, "nats"))
    slow = report("slow", Fact("speed", 10.0, "tokens/s", 3, 1.0), Fact("loss", 4, "nats"))
    speed, loss = fast.compare(slow).facts
    # d(a/b) = sqrt((da/b)^2 + (a db/b^2)^2) = sqrt(0.3^2 + 0.3^2)
    assert speed == Fact("speed", 3.0, "x", 3, pytest.approx(0.3 * math.sqrt(2)))
    assert loss == Fact("loss", 0.5, "x")


def test_a_comparison_names_what_is_missing_and_skips_what_has_no_ratio() -> None:
    a = report("a", Fact("only a", 1), Fact("word", "x"), Fact("zero", 1.0), Fact("yes", True))
    b = report("b", Fact("only b", 1), Fact("word", "x"), Fact("zero", 0.0), Fact("yes", True))
    assert a.compare(b).facts == [Fact("only a", "missing in b"), Fact("only b", "missing in a")]


def test_a_comparison_of_unlike_units_is_refused() -> None:
    with pytest.raises(ValueError, match='"time" is in .ms. here and in .s. there'):
        report("a", Fact("time", 1.0, "ms")).compare(report("b", Fact("time", 1.0, "s")))


def test_provenance_says_what_a_reader_needs_to_measure_again() -> None:
    facts = provenance(seed=7)
    assert {"commit", "device", "machine", "python", "torch", "command", "time", "seed"} == set(facts)
    assert facts["seed"] == 7
    assert "seed" not in provenance()
    assert not Path(str(facts["command"]).split()[0]).is_absolute()


def test_the_commit_is_ours_or_none(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "src" / "plait" / "report.py"
    strange = tmp_path / "lib" / "plait"
    strange.mkdir(parents=True)
    (strange / "report.py").write_text(source.read_text())
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    code = f"import sys; sys.path.insert(0, {str(strange)!r}); import report; print(report.provenance()['commit'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "None\n"
