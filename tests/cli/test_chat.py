"""`plait chat`: turns, commands, sessions across restarts, Ctrl-C and Ctrl-D, on lines and in a real terminal."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from plait.cli.chat import COMMANDS, Chat, Inputs, sampling
from plait.cli.launch import launch
from plait.engine.conversation import Conversation
from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.bpe import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid that draws words only, with its tokenizer."""
    words = tmp_path_factory.mktemp("words")
    train_bpe(["the quick brown fox jumps over the lazy dog. " * 4], 320).save(words)
    config = ModelConfig.from_pattern(
        "M-M*-",
        name="tiny",
        vocab_size=320,
        d_model=32,
        init_std=0.3,
        mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        mlp={"d_ff": 64},
    )
    model = build(config, recipe="fp32")
    assert model.head is not None
    with torch.no_grad():
        model.head.weight[:286] = 0
    path = tmp_path_factory.mktemp("models") / "model"
    save(model, path, tokenizer=words)
    return path


class Script:
    """A screen that says prepared lines and keeps what it is shown."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.told: list[str] = []
        self.answers: list[str] = []

    def ask(self) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def tell(self, text: str) -> None:
        self.told.append(text)

    def answer(self, pieces: Iterator[str]) -> None:
        self.answers.append("")
        for piece in pieces:
            self.answers[-1] += piece


def played(folder: Path, *lines: str, file: Path | None = None) -> tuple[Chat, Script]:
    script = Script(*lines)
    engine = Engine(load(folder, device="cpu"))
    chat = Chat(Conversation(engine, Sampling(max_tokens=12, temperature=0)), script, file)
    chat.run()
    return chat, script


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = launch(["chat", *map(str, words), "--max-tokens", "10", "--temperature", "0"])
    out, err = capsys.readouterr()
    return status, out, err


def test_turns_are_answered_and_the_second_reads_only_what_is_new(folder: Path) -> None:
    talk, script = played(folder, "the fox", "", "and the dog")
    assert len(script.answers) == 2 and all(script.answers)
    first, second = talk.completions
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert "tokens/s" in script.told[0] and "constant state" in script.told[0] and "attention" in script.told[0]


def test_lines_from_a_pipe_are_answered_on_standard_output(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = chat(capsys, monkeypatch, "the fox\n/set\n", folder, "--json")
    _, script = played(folder, "the fox")
    report = json.loads(out.splitlines()[-1])
    assert status == 0
    assert out.startswith(script.answers[0][:20])
    assert "temperature=0" in err and "tokens/s" in err
    facts = {fact["name"]: fact["value"] for fact in report["facts"]}
    assert facts["answers"] == 1 and facts["cache of constant size"] > facts["cache that grows with the context"] > 0


def test_a_session_file_goes_on_after_a_restart_as_without_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "talk.session"
    _, both, _ = chat(capsys, monkeypatch, "the fox\nand the dog\n", folder, "--json")
    chat(capsys, monkeypatch, "the fox\n", folder, "--session", file)
    _, second, err = chat(capsys, monkeypatch, "and the dog\n", folder, "--session", file, "--json")
    assert "1 turn, " in err and str(file) in err
    # the last line is the report, the line before it the answer
    assert second.splitlines()[-2] == both.splitlines()[-2]
    assert json.loads(second.splitlines()[-1])["facts"][3]["value"] > 0


def test_save_and_load_tell_how_many_bytes(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    talk, script = played(folder, "the fox", f"/save {file}", "/reset", f"/load {file}", "and the dog")
    said = next(line for line in script.told if "saved to" in line)
    assert "constant state" in said and "attention" in said and file.stat().st_size > 0
    assert talk.completions[1].usage.cached_tokens > 0
    straight, _ = played(folder, "the fox", "and the dog")
    assert talk.completions[1].token_ids == straight.completions[1].token_ids


def test_reset_and_system_begin_anew(folder: Path) -> None:
    talk, _ = played(folder, "the fox", "/reset", "the fox", "/system be brief", "the fox")
    first, again, third = talk.completions
    assert again.token_ids == first.token_ids and again.prompt_ids == first.prompt_ids
    assert third.usage.cached_tokens == 0
    assert talk.conversation.session.messages[0] == {"role": "system", "content": "be brief"}


def test_settings_change_between_answers(folder: Path) -> None:
    talk, script = played(
        folder, "/set max_tokens=3", "the fox", "/set top_k=5", "/set top_k=off", "/set temperature = 1"
    )
    assert talk.completions[0].usage.completion_tokens <= 3
    assert talk.conversation.sampling == Sampling(max_tokens=3, temperature=1)
    assert "top_k=5" in script.told[2] and "top_k=None" in script.told[3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/quitt", "there is no /quitt, did you mean /quit?"),
        ("/set temprature=1", "temperature"),
        ("/set temperature=hot", "temperature"),
        ("/set temperature=-1", "temperature=-1"),
        ("/set temperature", "write /set NAME=VALUE"),
        ("/set foo=off", "write /set NAME=VALUE"),
        ("/load absent", "absent does not exist"),
        ("/load", "from where"),
        ("/save", "where to"),
        ("/save /dev/null/x", "error"),
    ],
)
def test_a_wrong_command_is_told_and_the_talk_goes_on(folder: Path, line: str, message: str) -> None:
    talk, script = played(folder, line, "the fox")
    assert script.told[0].startswith("error: ") and message in script.told[0]
    assert len(talk.completions) == 1


def test_help_lists_every_command_and_quit_leaves(folder: Path) -> None:
    talk, script = played(folder, "/help", "/quit", "the fox")
    assert all(f"/{name}" in script.told[0] for name in COMMANDS)
    assert talk.completions == []


def test_a_doubled_slash_says_a_line_that_begins_with_one(folder: Path) -> None:
    talk, _ = played(folder, "//help me")
    assert talk.conversation.session.messages[0]["content"] == "/help me"


def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path) -> None:
    class Impatient(Script):
        def answer(self, pieces: Iterator[str]) -> None:
            self.answers.append("")
            for n, piece in enumerate(pieces):
                self.answers[-1] += piece
                if n == 3 and len(self.answers) == 1:
                    os.kill(os.getpid(), signal.SIGINT)

    script = Impatient("the fox", "and the dog")
    before = signal.getsignal(signal.SIGINT)
    engine = Engine(load(folder, device="cpu"))
    talk = Chat(Conversation(engine, Sampling(max_tokens=12, temperature=0)), script)
    talk.run()
    assert signal.getsignal(signal.SIGINT) is before
    first, second = talk.completions
    assert first.finish_reason == "cancelled" and first.usage.completion_tokens == 4
    # nothing was lost: the next turn reads on from there
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 3
    assert talk.conversation.session.messages[1] == {"role": "assistant", "content": first.text}


def test_a_second_ctrl_c_stops_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(load(folder, device="cpu"))
    script = Script("the fox", "and the dog")
    talk = Chat(Conversation(engine, Sampling(max_tokens=12, temperature=0)), script)
    mixer = engine.model.blocks[1]
    forward, calls = mixer.forward, []

    def pressed_twice(*args: object, **how: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **how)

    # a step that is one native call cannot be left in its middle; one of many operations can
    monkeypatch.setattr("plait.model.hybrid.step", lambda *args: None)
    monkeypatch.setattr(mixer, "forward", pressed_twice)
    talk.run()
    assert talk.completions[0].finish_reason == "cancelled"
    # in the middle of a step the cache is worth nothing: all is read again
    assert talk.completions[1].usage.cached_tokens == 0
    assert talk.completions[1].finish_reason != "cancelled"


def test_another_models_session_is_refused_with_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chat(capsys, monkeypatch, "the fox\n", folder, "--session", tmp_path / "talk")
    other = tmp_path / "other"
    model = load(folder, device="cpu")
    with torch.no_grad():
        model.norm.weight += 1
    save(model, other, tokenizer=folder)
    status, _, err = chat(capsys, monkeypatch, "the fox\n", other, "--session", tmp_path / "talk")
    assert status == 2 and "other weights" in err
    (tmp_path / "talk").write_bytes(b"half")
    status, _, err = chat(capsys, monkeypatch, "the fox\n", folder, "--session", tmp_path / "talk")
    assert status == 2 and "is not a session" in err


def test_options_reach_the_sampler(folder: Path) -> None:
    made = sampling(Inputs(checkpoint=folder, max_tokens=7, temperature=0.3, top_k=4, top_p=None, seed=9))
    assert made == Sampling(max_tokens=7, temperature=0.3, top_k=4, seed=9)
    with pytest.raises(ValueError, match="top_p=3"):
        Inputs(checkpoint=folder, top_p=3)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_shows_markdown_stops_on_ctrl_c_and_leaves_on_ctrl_d(folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "plait", "chat", str(folder), "--temperature", "0", "--max-tokens", "100000"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, close_fds=True
    )
    os.close(theirs)
    seen = ""

    def wait_for(text: str, seconds: float = 60) -> None:
        nonlocal seen
        ends = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < ends, f"{text!r} not in {seen[-2000:]!r}"
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                seen += os.read(ours, 65536).decode(errors="replace")
            except OSError:
                break
        assert text in seen, seen[-2000:]
        seen = seen.partition(text)[2]

    try:
        wait_for("\n> ")
        os.write(ours, b"the fox\n")
        # some of an answer that would run for minutes
        wait_for("the fox")
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        wait_for("(cancelled)")
        wait_for("\n> ")
        # Python sees a signal in the instant between prompt and read only at the next key: press until it answers
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            try:
                wait_for("Ctrl-D", seconds=1)
                break
            except AssertionError:
                continue
        else:
            raise AssertionError(f"Ctrl-C at the prompt says nothing: {seen[-2000:]!r}")
        os.write(ours, b"/set max_tokens=4\n")
        wait_for("max_tokens=4")
        wait_for("\n> ")
        os.write(ours, b"\x04")
        wait_for("generated tokens")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_reasoning_can_only_be_asked_of_who_knows_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = chat(capsys, monkeypatch, "the fox\n", folder, "--thinking", "on")
    assert status == 2 and "no switch for reasoning" in err
    status, _, _ = chat(capsys, monkeypatch, "the fox\n", folder, "--thinking", "auto")
    assert status == 0
