"""Holds measured facts: each with its value, unit, count and spread, and all with where they come from.

A report is what every verb returns. It prints as a table, is stored as JSON lines, and compares with another one.
"""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

Value = float | int | str | bool | None
# characters of a value that still stands in the table's column of numbers
WORD = 24


@dataclass(frozen=True, slots=True)
class Fact:
    """One measured thing.

    Args:
        name: what was measured; unique in a report that is to be compared.
        value: a number, or a word where there is none.
        unit: "tokens/s", "bytes", "nats/token"; empty for a bare number or word.
        n: how many measurements the value stands for.
        spread: their standard deviation, in the same unit; None if unknown.
    """

    name: str
    value: Value
    unit: str = ""
    n: int = 1
    spread: float | None = None


@functools.cache
def _commit() -> str | None:
    # a package installed inside somebody else's repository must not claim their commit
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "--no-optional-locks"]
    try:
        ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
        top = Path(ask([*git, "rev-parse", "--show-toplevel"]).stdout.strip())
        if top / "src" / "plait" != here:
            return None
        commit = ask([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return commit + ("+changes" if ask([*git, "status", "--porcelain", "--", "."]).stdout else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _device() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f"{name}, {cores} cores"
    # a report must not be what imports torch; where a GPU was used, torch is here already
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} ({device})"
    return device


def provenance(seed: int | None = None) -> dict[str, Value]:
    """Say where measurements come from: commit, device, machine, versions, command, time in UTC and, if given, seed."""
    program = Path(sys.argv[0] or "python").name
    # `python -m plait` and `plait` are the same command
    # where somebody's files lie is nobody else's business
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    command = ["plait" if program == "__main__.py" else program, *words]
    facts: dict[str, Value] = {
        "commit": _commit(),
        "device": _device(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "command": shlex.join(command),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return facts if seed is None else facts | {"seed": seed}


@dataclass(slots=True)
class Report:
    """A title, the facts under it, and where they come from (by default: here and now)."""

    title: str
    facts: list[Fact] = field(default_factory=list)
    provenance: Mapping[str, Value] = field(default_factory=provenance)

    def add(self, name: str, value: Value, unit: str = "", n: int = 1, spread: float | None = None) -> None:
        """Append one fact; the arguments are those of `Fact`."""
        self.facts.append(Fact(name, value, unit, n, spread))

    def table(self) -> str:
        """Return the facts as aligned lines of text under the title, without colours."""
        rows = [(fact.name, _shown(fact.value), fact.unit, _how_sure(fact)) for fact in self.facts]
        # a fact that is a sentence runs on past the column of numbers instead of widening it
        wide = [max((len(row[i]) for row in rows if i != 1 or len(row[i]) <= WORD), default=0) for i in range(3)]
        lines = [f"  {a:<{wide[0]}}  {b:>{wide[1]}} {c:<{wide[2]}}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join([self.title, *lines])

    def to_dict(self) -> dict[str, object]:
        """Return title, facts and provenance as JSON-ready data; infinities and nan become words, as JSON has none."""
        facts = [{key: _plain(value) for key, value in asdict(fact).items()} for fact in self.facts]
        return {"title": self.title, "facts": facts, "provenance": dict(self.provenance)}

    def save_jsonl(self, path: Path | str) -> None:
        """Write a line with title and provenance, then a line per fact; the file appears whole or not at all."""
        whole = self.to_dict()
        head = {"title": whole["title"], "provenance": whole["provenance"]}
        facts = whole["facts"]
        assert isinstance(facts, list)
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in [head, *facts])
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load_jsonl(cls, path: Path | str) -> "Report":
        """Read back what `save_jsonl` wrote.

        Raises: ValueError naming the file if it is not such a report.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        try:
            head, *rows = [json.loads(line) for line in lines]
            facts = [Fact(**row | {"value": _number(row["value"])}) for row in rows]
            return cls(head["title"], facts, head["provenance"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a report written by plait: {error}") from None

    def compare(self, other: "Report") -> "Report":
        """Return the ratio of each of our numbers to the other report's number of the same name.

        The spread of a ratio follows from both spreads, taken as independent. Words and zero denominators have no
        ratio and are left out; a fact that only one report has is named as missing in the other.

        Raises: ValueError if a fact has another unit there.
        """
        theirs = {fact.name: fact for fact in other.facts}
        result = Report(f"{self.title} / {other.title}", provenance=self.provenance)
        for ours in self.facts:
            their = theirs.pop(ours.name, None)
            if their is None:
                result.add(ours.name, f"missing in {other.title}")
            elif their.unit != ours.unit:
                raise ValueError(f'"{ours.name}" is in {ours.unit!r} here and in {their.unit!r} there; measure alike')
            elif _is_number(ours.value) and _is_number(their.value) and their.value:
                result.facts.append(_ratio(ours, their))
        for name in theirs:
            result.add(name, f"missing in {self.title}")
        return result


def _ratio(a: Fact, b: Fact) -> Fact:
    assert isinstance(a.value, (int, float)) and isinstance(b.value, (int, float))
    ratio = a.value / b.value
    spread = None
    if a.spread is not None and b.spread is not None:
        spread = math.hypot(a.spread / b.value, ratio * b.spread / b.value)
    return Fact(a.name, ratio, "x", min(a.n, b.n), spread)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Value) -> Value:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Value) -> Value:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _shown(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    return value


def _how_sure(fact: Fact) -> str:
    spread = "" if fact.spread is None else f"± {_shown(fact.spread)}"
    return f"{spread} (n={fact.n})".strip() if fact.n != 1 else spread
