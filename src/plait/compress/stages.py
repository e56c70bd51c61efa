"""Stages of a long piece of work, each kept in a folder named after what went into it.

    OUT/stages/NAME-HASH/            a finished stage: its results, and stage.json with its inputs and how long it took
    OUT/stages/.NAME-HASH.work/      one that runs, or was stopped; it goes on in there

HASH is that of the name and the inputs, in which an earlier stage stands for itself by its own folder's name. So a
stage is run again exactly when something that it depends on has changed, at whatever distance; results of other inputs
stay where they are, and come back when the inputs do. A folder gets its final name when everything in it is on the
disk. A stage that is killed finds on its return what it has left, and must make of it what it would have made anyway.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from plait.config import ConfigError, nearest
from plait.formats.shards import sha256_of
from plait.train.metrics import write_whole

log = logging.getLogger(__name__)

FILE = "stage.json"
# digits of a hash in a folder's name
DIGITS = 12


class Stages:
    """The stages of one output folder, which no other process uses meanwhile (train/lock.py)."""

    def __init__(self, out: Path, *, again: Sequence[str] = (), until: str | None = None) -> None:
        """
        Args:
            out: the folder; stages/ is made in it.
            again: names of stages whose results are made anew, this time, and so are those that are made of them.
            until: name of the last stage to run; asking for a later one raises UntilError.
        """
        self.folder, self.until = out / "stages", until
        self._again, self._asked, self._anew = set(again), set[Path](), set[str]()
        self.ran: list[tuple[str, float, bool]] = []
        """Every stage asked for: its folder's name, the seconds it took when it was made, whether that was now."""

    def run(self, name: str, inputs: Mapping[str, object], make: Callable[[Path], None]) -> Path:
        """A stage's folder, made now if it is not there.

        Args:
            name: of the stage: what it does, and for which candidate if there are several: "short-2".
            inputs: all that its result depends on, JSON-ready; earlier stages as the paths that they returned.
            make: fills the folder that it is given, or goes on filling it. The same inputs must give the same files.

        Raises: whatever `make` raises; what it has written stays for the next time.
        """
        told = _plain(inputs, self.folder)
        target = self.folder / f"{name}-{key_of(name, told)}"
        if target in self._asked:
            return target
        kind = name.partition("-")[0]
        if kind in self._again or not self._anew.isdisjoint(_names(told)):
            self._anew.add(target.name)
            if self._forget(target):
                log.info("%s is made again", name)
        if not (target / FILE).is_file():
            work = target.with_name(f".{target.name}.work")
            work.mkdir(parents=True, exist_ok=True)
            resumed = any(work.iterdir())
            log.info("%s%s", name, ": going on" if resumed else "")
            begin = time.monotonic()
            make(work)
            seconds = time.monotonic() - begin
            write_whole(work / FILE, json.dumps({"stage": name, "inputs": told, "seconds": seconds}, indent=1) + "\n")
            _sync(work)
            os.rename(work, target)
            self.ran.append((target.name, seconds, True))
        else:
            facts = json.loads((target / FILE).read_text(encoding="utf-8"))
            self.ran.append((target.name, facts["seconds"], False))
        self._asked.add(target)
        if kind == self.until:
            raise UntilError(f"stopped after {name}, as asked: {target}")
        return target

    def _forget(self, target: Path) -> bool:
        """Remove a result; a kill in the middle leaves nothing that looks like one."""
        found = False
        for path in (target, target.with_name(f".{target.name}.work")):
            if path.is_dir():
                doomed = path.with_name(f".{path.name.strip('.')}.gone")
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(path, doomed)
                shutil.rmtree(doomed)
                found = True
        return found

    def sweep(self) -> None:
        """Remove what a kill left of removed results."""
        for path in self.folder.glob(".*.gone"):
            shutil.rmtree(path, ignore_errors=True)


class UntilError(Exception):
    """The stage that was asked for has run."""


def check_names(names: Sequence[str], known: Sequence[str], field: str) -> None:
    """Raises: ConfigError for a stage that there is not, naming the nearest."""
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"stages: {', '.join(known)}"
            raise ConfigError(f"{field}={name!r} is no stage; {hint}")


def key_of(name: str, inputs: object) -> str:
    """The hash in a stage's name: equal names and inputs have equal ones, on every machine."""
    text = json.dumps([name, inputs], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def identity_of(folder: Path) -> str:
    """What a checkpoint is: a hash over the bytes of its tensors and its settings, wherever it lies.

    Raises: OSError if a file cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    prints = [[path.name, sha256_of(path)] for path in files]
    return hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16]


def _plain(value: object, stages: Path) -> object:
    """JSON-ready; a stage's folder is its name, of any other path only a file's own content could say what it is."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, stages) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, stages) for item in value]
    if isinstance(value, Path):
        if value.parent != stages:
            raise TypeError(f"{value} is no stage's folder: give what decides its content in its place")
        return value.name
    return value


def _names(told: object) -> set[str]:
    """All words among a stage's inputs, the names of earlier stages among them."""
    if isinstance(told, Mapping):
        return set().union(*map(_names, told.values()))
    if isinstance(told, list):
        return set().union(*map(_names, told))
    return {told} if isinstance(told, str) else set()


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
