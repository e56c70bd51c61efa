"""The command line: words become inputs, failures become one line and an exit status, and nothing heavy is loaded."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from plait.cli import VERBS
from plait.cli.launch import arg, launch, read_inputs
from plait.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    recipe: Path = arg(help="settings of the run, 100% TOML", positional=True)
    overrides: tuple[str, ...] = arg(default=(), help="settings laid over it", positional=True)
    seed: int = arg(default=0, help="where randomness starts")
    rate: float | None = arg(default=None, help="learning rate")
    to: Literal["hf", "native"] = arg(default="native", help="format")
    compiled: bool = arg(default=True, help="compile")
    max_batch: int = arg(default=8, help="sequences at once")
    stops: tuple[str, ...] = arg(default=("a", "b"), help="where to stop")
    sizes: tuple[int, ...] = arg(default=(), help="lengths")

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must not be negative")


def read(*words: str) -> Inputs:
    return read_inputs(Inputs, words, "plait play", "plait play run.toml seed=1")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Inputs], Report]], None]:
    """Makes `plait play` run the given function."""

    def install(run: Callable[[Inputs], Report]) -> None:
        module = ModuleType("plait_test_play")
        module.__dict__.update(EXAMPLE="plait play run.toml seed=1", Inputs=Inputs, run=run)
        monkeypatch.setitem(sys.modules, "plait_test_play", module)
        monkeypatch.setitem(VERBS, "play", ("plait_test_play", "play a game"))

    return install


def plait(*words: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "plait", *words], capture_output=True, text=True, check=False, **how)  # pyright: ignore


def test_words_and_options_mix_in_any_order() -> None:
    inputs = read("--seed", "3", "a.toml", "x=1", "--no-compiled", "y.z=2", "--stops", "c, d,", "--sizes=1,2")
    assert inputs == Inputs(
        recipe=Path("a.toml"), seed=3, overrides=("x=1", "y.z=2"), compiled=False, stops=("c", "d"), sizes=(1, 2)
    )


def test_what_is_not_given_keeps_its_default() -> None:
    assert read("a.toml") == Inputs(recipe=Path("a.toml"))


def test_values_have_the_type_of_their_field() -> None:
    inputs = read("a.toml", "--rate", "1e-3", "--to", "hf", "--max-batch", "2", "--seed", "1_000")
    assert (inputs.rate, inputs.to, inputs.max_batch, inputs.seed) == (1e-3, "hf", 2, 1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RECIPE; see plait play --help"),
        (["a.toml", "--sede", "3"], "'--sede' is not understood; did you mean --seed?"),
        (["a.toml", "--zzz"], "'--zzz' is not understood; see plait play --help"),
        (["a.toml", "--max", "3"], "'--max' is not understood"),
        (["a.toml", "stray"], "'stray' is not understood; settings are given as key=value, see plait play --help"),
        (["a.toml", "--seed", "x"], "argument --seed: invalid int value: 'x'; see plait play --help"),
        (["a.toml", "--sizes", "1,x"], "argument --sizes: invalid int list value: '1,x'"),
        (["a.toml", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
        (["a.toml", "--seed", "-1"], "seed = -1 must not be negative"),
    ],
)
def test_words_that_do_not_fit_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(*words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_help_of_a_verb_shows_fields_defaults_and_the_example(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(lambda inputs: Report("never"))
    assert launch(["play", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("play a game", "RECIPE", "100% TOML", "key=value", "--seed INT", "{hf,native}", "--no-compiled"):
        assert part in text
    assert text.count("(default: True)") == 1
    assert "(default: a,b)" in text
    assert "example:\n  plait play run.toml seed=1" in text


def test_a_report_is_printed_as_a_table_or_as_one_json_line(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(inputs: Inputs) -> Report:
        print("something on the way")
        report = Report("game")
        report.add("score", inputs.seed)
        return report

    verb(run)
    assert launch(["play", "a.toml", "--seed", "5"]) == 0
    assert capsys.readouterr().out == "something on the way\ngame\n  score  5\n"
    assert launch(["play", "a.toml", "--seed", "5", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["title"], last["facts"][0]["value"]) == ("game", 5)


def test_a_report_without_facts_is_not_printed(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda inputs: Report("empty"))
    assert launch(["play", "a.toml"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("lr = -1:\n must be positive"), 2, "lr = -1: must be positive"),
        (FileNotFoundError(2, "No such file", "/no/where.toml"), 2, "/no/where.toml does not exist"),
        (RuntimeError("lost"), 1, "RuntimeError: lost (PLAIT_TRACEBACK=1 shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_is_one_line_on_standard_error(
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def run(inputs: Inputs) -> Report:
        raise error

    verb(run)
    assert launch(["play", "a.toml"]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"plait play: {message}")
    # a script that asked for JSON gets JSON also then
    assert launch(["play", "a.toml", "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == status and told["error"].startswith(message)


def test_a_traceback_is_shown_on_request(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(inputs: Inputs) -> Report:
        raise ValueError("deep down")

    verb(run)
    monkeypatch.setenv("PLAIT_TRACEBACK", "1")
    assert launch(["play", "a.toml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["trian"]) == 2
    assert capsys.readouterr().err == "plait: there is no verb 'trian'; did you mean train?\n"


def test_the_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and summary in text for name, (_, summary) in VERBS.items())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"plait {verb}" in text.partition("example:")[2] and "--json" in text


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--completion", "bash"], ["nonsense"]])
def test_what_needs_no_model_loads_nothing_heavy_and_so_comes_at_once(words: list[str]) -> None:
    code = f"import sys; from plait.cli.launch import launch; launch({words!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "plait.cli.launch" in loaded
    heavy = {"torch", "numpy", "safetensors", "tokenizers", "transformers", "jinja2", "starlette", "uvicorn", "highspy"}
    assert not loaded & heavy


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import plait as package

    assert launch(["--version"]) == 0
    assert capsys.readouterr().out == f"plait {package.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_offers_the_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert " ".join(VERBS) in script
    if shell == "bash":
        ask = script + '\nCOMP_WORDS=(plait tr); COMP_CWORD=1; _plait; echo "${COMPREPLY[@]}"'
        assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout == "train\n"


# output that is not buffered fails at once and hides what happens at exit
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_closed_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "plait", "--help"]
    ran = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, env=BUFFERED)
    os.close(write_end)
    assert (ran.returncode, ran.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "plait", "--help"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert ran.returncode == 1
    assert ran.stderr == "plait: no space left for the output; free some, or choose a place on another disk\n"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts(stop: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import dataclasses, time\n"
        "EXAMPLE = 'plait sleep'\n"
        "Inputs = dataclasses.make_dataclass('Inputs', [])\n"
        "def run(inputs):\n    print('asleep', flush=True)\n    time.sleep(60)\n"
    )
    code = (
        "import plait.cli, plait.__main__ as m; plait.cli.VERBS['sleep'] = ('sleeper', ''); raise SystemExit(m.main())"
    )
    command = [sys.executable, "-c", code, "sleep"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "asleep\n"
    process.send_signal(stop)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "plait sleep: interrupted\n")


def test_python_dash_m_is_the_same_program() -> None:
    ran = plait("trian")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "did you mean train?" in ran.stderr
