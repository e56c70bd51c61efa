"""Kills a compression at random moments, resumes it each time, and compares it with one that was left alone.

    python bench/kill_compress.py --kills 10

Kills are SIGKILL, at random moments across the stages. At the end the student, every other model and the search must be
equal bit for bit; only measured speeds may differ.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plait.data.writer import ShardWriter
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.report import Report, provenance

SETTINGS = """
keep = 2
ranking = 3
candidates = 6
device = "a10g"
baselines = ["depth", "random"]
full = {full}
method = "{method}"
[budget]
params = 40000
[lessons]
steps = 20
save_every = 3
[scoring]
batches = 6
layer_batches = 2
[teaching]
tokens = {tokens}
precision = "fp32"
validation_batches = 2
save_every = 3
top = {top}
[teaching.rows]
seq_len = 32
batch_size = 4
accumulate = 2
"""


def prepare(folder: Path, *, steps: int, method: str, top: int, full: bool, seed: int = 0) -> None:
    """Write a small dataset, a teacher of random weights, and the settings of a compression."""
    rng = random.Random(seed)
    for name, n in (("train", 400), ("valid", 40)):
        with ShardWriter(folder / "data" / name, 64, eos_id=63) as writer:
            for _ in range(n):
                writer.add([rng.randrange(63) for _ in range(rng.randrange(5, 60))])
    config = ModelConfig.from_pattern(
        "M-M*-M-",
        vocab_size=64,
        d_model=48,
        mamba2={"n_heads": 6, "head_dim": 8, "d_state": 8, "n_groups": 2, "chunk": 8},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 12},
        mlp={"d_ff": 96},
    )
    save(build(config, "fp32", seed=seed), folder / "teacher", format="native")
    text = SETTINGS.format(tokens=steps * 128, method=method, top=top, full=str(full).lower())
    (folder / "settings.toml").write_text(text)


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    """A compressing process on one thread, whose messages go to OUT.log."""
    command = [sys.executable, "-m", "plait", "compress", str(folder / "teacher"), "--data", str(folder / "data")]
    command += ["--settings", str(folder / "settings.toml"), "--context", "256", "--device", "a10g", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_TRACEBACK": "1"}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Let a run go to its end.

    Raises: RuntimeError with its messages if it fails.
    """
    if process.wait():
        raise RuntimeError(f"the run in {out} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def kill_one(folder: Path, out: Path, delay: float) -> str:
    """Start or resume the run, let it work for a while, and kill it.

    Args:
        folder, out: the run.
        delay: seconds after it begins to write.

    Returns: the stage that it was in, "between" stages, or "end" if it finished before.
    """
    before, process = _marks(out), start(folder, out)
    try:
        while process.poll() is None and _marks(out) == before:
            time.sleep(0.005)
        until = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        if process.poll() is not None:
            return "end"
        working = sorted((out / "stages").glob(".*.work"))
        return working[0].name[1:].partition("-")[0] if working else "between"
    finally:
        process.kill()
        if process.wait() not in (0, -9):
            raise RuntimeError(f"the run in {out} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def different(whole: Path, torn: Path) -> list[str]:
    """Names of stages, of models and of searches that are not equal bit for bit."""
    ours, theirs = ({path.name for path in (out / "stages").iterdir()} for out in (whole, torn))
    wrong = sorted(ours ^ theirs)
    for name in ours & theirs:
        a, b = whole / "stages" / name, torn / "stages" / name
        files = ["model/model.safetensors", "scores.safetensors", "search.json", "choice.json"]
        files += [path.relative_to(a).as_posix() for path in a.glob("**/layer-*/*.safetensors")]
        files += [path.relative_to(a).as_posix() for path in a.glob("answers/*/answers.safetensors")]
        for file in files:
            if (a / file).is_file() and (
                not (b / file).is_file() or (a / file).read_bytes() != (b / file).read_bytes()
            ):
                wrong.append(f"{name}/{file}")
    return wrong


def torture(
    folder: Path, *, kills: int, steps: int, method: str = "minipuzzle", top: int = 0, full: bool = True, seed: int = 0
) -> Report:
    """Do all of it in a folder.

    Returns: how many kills fell into which stage, and whether everything is equal.
    """
    prepare(folder, steps=steps, method=method, top=top, full=full)
    whole, torn = folder / "whole", folder / "torn"
    begin = time.monotonic()
    alone = start(folder, whole)
    while alone.poll() is None and not _marks(whole):
        time.sleep(0.005)
    starting = time.monotonic()
    finish(alone, whole)
    working = time.monotonic() - starting
    rng = random.Random(seed)
    where: dict[str, int] = {}
    for _ in range(kills):
        # most stages are short: many kills soon after the start, few late ones
        stage = kill_one(folder, torn, rng.random() ** 3 * 4 * working / kills)
        where[stage] = where.get(stage, 0) + 1
    finish(start(folder, torn), torn)
    report = Report(f"{kills} kills of a compression ({method}, {steps} steps)", provenance=provenance(seed))
    report.add("seconds of the run left alone", time.monotonic() - begin, "s")
    for stage, n in where.items():
        report.add(f"killed in {stage}", n)
    wrong = different(whole, torn)
    report.add("everything equal bit for bit", not wrong)
    for name in wrong[:10]:
        report.add("differs", name)
    student = "model/model.safetensors"
    report.add("student equal bit for bit", (whole / student).read_bytes() == (torn / student).read_bytes())
    report.add("stages", len(json.loads((torn / "result.json").read_text())["stages"]))
    left = [path.name for path in (torn / "stages").iterdir() if path.name.startswith(".")]
    report.add("folders left by kills", len(left))
    return report


def _marks(out: Path) -> set[tuple[str, int]]:
    """Files of the stages, with their times."""
    found = set()
    for path in (out / "stages").rglob("*") if (out / "stages").is_dir() else ():
        try:
            found.add((str(path), path.stat().st_mtime_ns))
        except FileNotFoundError:
            # renamed or removed while we looked
            continue
    return found


def main() -> None:
    """Read the arguments, do it, print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--method", default="minipuzzle", choices=("minipuzzle", "puzzle"))
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = torture(
            Path(folder), kills=args.kills, steps=args.steps, method=args.method, top=args.top, seed=args.seed
        )
    print(report.table())
    if any(fact.value is False for fact in report.facts):
        sys.exit(1)


if __name__ == "__main__":
    main()
