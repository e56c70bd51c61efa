"""Kills a training run at random moments, resumes it each time, and compares it with a run that was left alone.

    python bench/kill.py --kills 20

Kills are SIGKILL: after a random number of steps, in the middle of a step, and while a checkpoint is being written.
Afterwards every checkpoint found must be readable, and at the end weights and losses must be equal bit for bit.
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
from plait.dist import state
from plait.report import Report, provenance

RECIPE = """
precision = "fp32"
[model]
pattern = "M-*-"
d_model = 32
[model.mamba2]
n_heads = 4
head_dim = 8
d_state = 8
n_groups = 2
chunk = 8
[model.attention]
n_heads = 4
n_kv_heads = 2
head_dim = 8
[model.mlp]
d_ff = 64
[data]
seq_len = 24
batch_size = 4
accumulate = 2
[data.sources.words]
path = "{data}"
[run]
steps = {steps}
save_every = {save_every}
keep = 2
[run.optim]
kind = "{kind}"
[run.schedule]
peak = 1e-2
"""


def prepare(folder: Path, *, steps: int, save_every: int, kind: str = "adamw", seed: int = 0) -> Path:
    """Write a small dataset and a recipe that trains on it.

    Returns: the recipe's path.
    """
    rng = random.Random(seed)
    with ShardWriter(folder / "words", 64, eos_id=63) as writer:
        for _ in range(200):
            writer.add([rng.randrange(63) for _ in range(rng.randrange(5, 60))])
    recipe = folder / "recipe.toml"
    data = (folder / "words").as_posix()
    recipe.write_text(RECIPE.format(data=data, steps=steps, save_every=save_every, kind=kind))
    return recipe


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """A training process on one thread, whose messages go to out.log."""
    command = [sys.executable, "-m", "plait", "train", str(recipe), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_TRACEBACK": "1"}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Let a run go to its end.

    Raises: RuntimeError with its messages if it fails.
    """
    if process.wait():
        raise RuntimeError(f"the run in {out} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def kill_one(recipe: Path, out: Path, rng: random.Random, most_steps: int) -> str:
    """Start or resume the run and kill it.

    Args:
        recipe, out: the run.
        rng: decides when.
        most_steps: the latest kill, in steps after the process began to train.

    Returns: "step" or "save", what it was doing, or "end" if it finished before.
    """
    process = start(recipe, out)
    before, wanted, saving = _lines(out), rng.randint(0, most_steps), rng.random() < 0.5
    doing = "step"
    try:
        while process.poll() is None:
            # a resumed process first cuts the lines that it repeats
            before = min(before, _lines(out))
            if _lines(out) - before >= wanted and (not saving or _is_saving(out)):
                time.sleep(rng.random() * 0.02 if not saving else rng.random() * 0.004)
                doing = "save" if _is_saving(out) else "step"
                break
            time.sleep(0.0005)
        return doing if process.poll() is None else "end"
    finally:
        process.kill()
        if process.wait() not in (0, -9):
            raise RuntimeError(f"the run in {out} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def unreadable(out: Path) -> list[str]:
    """What is wrong with the checkpoints that bear a final name."""
    wrong = []
    for path in (out / "checkpoints").glob("step-*"):
        try:
            state.read(path)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def losses(out: Path) -> dict[int, float]:
    """The loss of every step, from metrics.jsonl."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def torture(folder: Path, *, kills: int, steps: int, save_every: int, seed: int = 0, kind: str = "adamw") -> Report:
    """Do all of it in a folder.

    Returns: how many kills fell where, unreadable checkpoints, and whether weights and losses are equal.
    """
    recipe = prepare(folder, steps=steps, save_every=save_every, kind=kind)
    whole, torn = folder / "whole", folder / "torn"
    # beside the other, on the second core
    alone = start(recipe, whole)
    rng, where, wrong = random.Random(seed), {"step": 0, "save": 0, "end": 0}, []
    for _ in range(kills):
        where[kill_one(recipe, torn, rng, most_steps=max(2 * (steps - 2 * save_every) // kills - save_every, 1))] += 1
        wrong += unreadable(torn)
    finish(start(recipe, torn), torn)
    finish(alone, whole)
    name = "final/model.safetensors"
    report = Report(f"{kills} kills of a run of {steps} steps ({kind})", provenance=provenance(seed))
    report.add("killed in a step", where["step"])
    report.add("killed while saving", where["save"])
    report.add("ended before its kill", where["end"])
    report.add("unreadable checkpoints", len(wrong))
    report.add("weights equal bit for bit", (whole / name).read_bytes() == (torn / name).read_bytes())
    report.add("losses equal bit for bit", losses(whole) == losses(torn) and len(losses(whole)) == steps)
    left = [path.name for path in (torn / "checkpoints").iterdir() if not path.name.startswith("step-")]
    report.add("files left by kills", len(left))
    return report


def _lines(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _is_saving(out: Path) -> bool:
    return any((out / "checkpoints").glob(".step-*")) if (out / "checkpoints").is_dir() else False


def main() -> None:
    """Read the arguments, do it, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optim", default="adamw", choices=("adamw", "muon"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = torture(
            Path(folder),
            kills=args.kills,
            steps=args.steps,
            save_every=args.save_every,
            seed=args.seed,
            kind=args.optim,
        )
    print(report.table())
    bad = [fact.name for fact in report.facts if fact.value is False]
    if bad or any(fact.name == "unreadable checkpoints" and fact.value for fact in report.facts):
        sys.exit(1)


if __name__ == "__main__":
    main()
