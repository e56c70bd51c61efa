"""Measures llama.cpp beside us: its own llama-bench on models of the very shapes, a process per round.

    llama-bench -m MODEL.gguf -t THREADS -p TOKENS -n 0 -r 1 -o json            a prompt
    llama-bench -m MODEL.gguf -t THREADS -p 0 -n TOKENS -d DEPTH -r 1 -o json   decoding after DEPTH tokens

It warms up by itself, asks for the logits of the last token only, and counts no sampling: as we do on our side. To
reach a depth it reads a random prompt of that length first; it then repeats without reading it again, so that deep
rounds are one process instead of many.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.cli.benches.shapes import as_llama
from plait.cli.benches.sides import Side
from plait.model.config import ModelConfig

# our recipe -> the type of their weights
TYPES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0", "ternary-packed": "tq2_0", "ternary-packed-int8": "tq2_0"}
# seconds that no single process should need
LIMIT_S = 300.0
DEEP = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a llama-bench process found: tokens/s of each repetition, bytes and parameters of the model, threads."""

    rates: tuple[float, ...]
    model_bytes: int
    model_params: int
    threads: int
    build: str


def parse(text: str) -> Run:
    """Read what `llama-bench -o json` prints for one test.

    Raises: ValueError if it is something else.
    """
    try:
        (row,) = json.loads(text[text.index("[") :])
        return Run(
            rates=tuple(float(rate) for rate in row["samples_ts"]),
            model_bytes=int(row["model_size"]),
            model_params=int(row["model_n_params"]),
            threads=int(row["n_threads"]),
            build=str(row["build_commit"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"this is no output of llama-bench -o json for one test: {error}; got {text[:200]!r}"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaBench:
    """binary: llama-bench. model: a GGUF file. threads: for it to use."""

    binary: Path
    model: Path
    threads: int

    def prefill(self, tokens: int, batch: int = 2048) -> Side:
        """A side: tokens/s of a prompt, the mean of one repetition."""
        return lambda: self.run("-p", str(tokens), "-n", "0", "-b", str(batch)).rates[0]

    def decode(self, tokens: int, depth: int, rounds: int) -> Side:
        """A side: tokens/s of decoding. Where reading up to the depth takes long, one process does all the rounds."""
        words = ["-p", "0", "-n", str(tokens), *(["-d", str(depth)] if depth else [])]
        if depth < DEEP:
            return lambda: self.run(*words).rates[0]
        left: list[float] = []

        def side() -> float:
            if not left:
                # one more, as of all sides, that does not count
                left.extend(self.run(*words, repeats=rounds + 1).rates)
            return left.pop(0)

        return side

    def logits(self, ids: Sequence[int]) -> Tensor | None:
        """(V,) float32 after some tokens; None without llama-logits, see bench/peers/README.md.

        Raises: RuntimeError with its last words if it fails.
        """
        program = self.binary.with_name("llama-logits")
        if not program.is_file():
            return None
        out = self._call([str(program), str(self.model), *map(str, ids)])
        return torch.frombuffer(bytearray(out), dtype=torch.float32)

    def run(self, *words: str, repeats: int = 1) -> Run:
        """Run it once.

        Raises: RuntimeError with its last words if it fails or takes longer than LIMIT_S.
        """
        command = [str(self.binary), "-m", str(self.model), "-t", str(self.threads), "-r", str(repeats)]
        return parse(self._call([*command, *words, "-o", "json"]).decode())

    def _call(self, command: list[str]) -> bytes:
        name = Path(command[0]).name
        try:
            done = subprocess.run(command, capture_output=True, timeout=LIMIT_S)
        except OSError as error:
            raise RuntimeError(f"{command[0]}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} took more than {LIMIT_S:.0f} s") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"{name}: {said[-1]}")
        return done.stdout


def llama_benches(
    binary: str, folder: str, model: str, recipe: str, config: ModelConfig, threads: int
) -> dict[str, LlamaBench]:
    """llama-bench for one of the test models, after a look at whether it is that model.

    Args:
        binary, folder: as given by the user.
        model, recipe: the names of ours; the file is FOLDER/MODEL-TYPE.gguf.
        config: its sizes, for counting parameters.
        threads: for it to use.

    Returns: by name: "llama.cpp" and, where there is a FOLDER/MODEL-TYPE-pure.gguf, "llama.cpp pure".
    Raises: ValueError if there is no such file, or it holds another number of parameters.
    """
    if recipe not in TYPES:
        raise ValueError(f"llama.cpp has no counterpart of recipe {recipe!r}; it has: {', '.join(TYPES)}")
    found = {}
    for name, ending in (("llama.cpp", ""), ("llama.cpp pure", "-pure")):
        path = Path(folder) / f"{Path(model).name}-{TYPES[recipe]}{ending}.gguf"
        if path.is_file():
            found[name] = LlamaBench(binary=Path(binary), model=path, threads=threads)
        elif not ending:
            raise ValueError(f"{path} does not exist; make it with python bench/peers/gguf_models.py --out {folder}")
    for one in found.values():
        counted, wanted = one.run("-p", "0", "-n", "1").model_params, as_llama(config).cost().params
        if counted != wanted:
            raise ValueError(f"{one.model} holds {counted:,} parameters, ours {wanted:,}; make it anew")
    return found
