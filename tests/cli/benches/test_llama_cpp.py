"""llama.cpp as a peer: what it prints is understood, what it refuses is told, and it must run the same model."""

import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from plait.cli.benches import shapes
from plait.cli.benches.llama_cpp import LlamaBench, llama_benches, parse

ROW = {
    "build_commit": "0c1e570",
    "model_size": 90_000_000,
    "model_n_params": 45_084_496,
    "n_threads": 2,
    "n_prompt": 0,
    "n_gen": 64,
    "avg_ts": 50.5,
    "samples_ns": [1, 2],
    "samples_ts": [50, 51.0],
}


def fake(folder: Path, body: str, name: str = "llama-bench") -> Path:
    """A program that behaves as told."""
    program = folder / name
    program.write_text(f"#!{sys.executable}\nimport sys, json\nrow = {ROW!r}\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_the_output_of_one_test_is_read() -> None:
    run = parse("some words of the library\n" + json.dumps([ROW]))
    assert run.rates == (50.0, 51.0) and run.model_params == 45_084_496 and run.threads == 2
    assert run.model_bytes == 90_000_000 and run.build == "0c1e570"


@pytest.mark.parametrize("text", ["", "[]", "[{}]", "error", json.dumps([ROW, ROW]), '[{"samples_ts": 3}]'])
def test_other_output_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no output of llama-bench"):
        parse(text)


def test_it_is_asked_for_what_is_measured(tmp_path: Path) -> None:
    body = """
row['samples_ts'] = [len(sys.argv)]
open(sys.argv[2] + '.said', 'w').write(' '.join(sys.argv[1:]))
print(json.dumps([row]))"""
    bench = LlamaBench(binary=fake(tmp_path, body), model=tmp_path / "m.gguf", threads=2)
    said = tmp_path / "m.gguf.said"
    assert bench.prefill(512)() > 0
    assert said.read_text() == f"-m {tmp_path}/m.gguf -t 2 -r 1 -p 512 -n 0 -b 2048 -o json"
    bench.decode(64, 16, rounds=5)()
    assert said.read_text().endswith("-t 2 -r 1 -p 0 -n 64 -d 16 -o json")
    # a deep cache is read once for all rounds and the one that does not count
    deep = bench.decode(64, 8192, rounds=2)
    deep()
    assert said.read_text().endswith("-t 2 -r 3 -p 0 -n 64 -d 8192 -o json")


def test_a_deep_process_gives_a_rate_to_each_round(tmp_path: Path) -> None:
    body = "row['samples_ts'] = [10, 11, 12]\nopen(sys.argv[2] + '.calls', 'a').write('x')\nprint(json.dumps([row]))"
    bench = LlamaBench(binary=fake(tmp_path, body), model=tmp_path / "m.gguf", threads=2)
    side = bench.decode(64, 8192, rounds=2)
    assert [side(), side(), side()] == [10, 11, 12]
    assert (tmp_path / "m.gguf.calls").read_text() == "x"


def test_its_last_words_are_told(tmp_path: Path) -> None:
    body = "print('loading', file=sys.stderr); print('failed to load model', file=sys.stderr); sys.exit(1)"
    with pytest.raises(RuntimeError, match="llama-bench: failed to load model"):
        LlamaBench(binary=fake(tmp_path, body), model=tmp_path, threads=1).run()
    with pytest.raises(RuntimeError, match="nowhere"):
        LlamaBench(binary=tmp_path / "nowhere", model=tmp_path, threads=1).run()


def test_logits_are_asked_of_the_program_beside_it(tmp_path: Path) -> None:
    bench = LlamaBench(binary=fake(tmp_path, ""), model=tmp_path / "m.gguf", threads=1)
    assert bench.logits([1, 2]) is None
    body = "import struct; sys.stdout.buffer.write(struct.pack('3f', 0.5, *map(float, sys.argv[2:])))"
    fake(tmp_path, body, "llama-logits")
    found = bench.logits([1, 2])
    assert found is not None and torch.equal(found, torch.tensor([0.5, 1.0, 2.0]))


def test_only_the_same_model_is_compared(tmp_path: Path) -> None:
    binary = fake(tmp_path, "print(json.dumps([row]))")
    config = shapes.config_of("45m")

    def found(model: str, recipe: str = "bf16") -> dict[str, LlamaBench]:
        return llama_benches(str(binary), str(tmp_path), model, recipe, shapes.config_of(model), 1)

    with pytest.raises(ValueError, match="gguf_models.py"):
        found("45m")
    for name in ("45m-bf16", "45m-q4_0", "45m-q4_0-pure", "290m-bf16"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    assert list(found("45m")) == ["llama.cpp"] and list(found("45m", "int4")) == ["llama.cpp", "llama.cpp pure"]
    with pytest.raises(ValueError, match=f"{config.cost().params:,} parameters, ours"):
        found("290m")
    with pytest.raises(ValueError, match="no counterpart of recipe 'fp32'"):
        found("45m", "fp32")
