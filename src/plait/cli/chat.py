"""`plait chat`: talk with a model, see how fast it is and how little it remembers, save the talk and go on later."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from plait.cli.drawing import size
from plait.cli.failure import INTERRUPTED
from plait.cli.launch import arg
from plait.cli.screen import Lines, Screen, Terminal
from plait.config import load as read_settings
from plait.config import nearest
from plait.engine.conversation import Conversation
from plait.engine.engine import Engine, TextStream
from plait.engine.request import Completion, Sampling
from plait.engine.session import CacheSize, Session
from plait.formats.checkpoint import load
from plait.report import Report

EXAMPLE = """plait chat path/to/checkpoint --temperature 0.7
  plait chat path/to/checkpoint --session talk.session     (goes on where it ended last time)
  printf 'Hello!\\nAnd now in German.\\n' | plait chat path/to/checkpoint"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Whom to talk with, and how it answers."""

    checkpoint: Path = arg(help="folder of the model", positional=True)
    session: Path | None = arg(default=None, help="file to go on from, if it is there, and to save to after each turn")
    system: str = arg(default="", help="text that opens the conversation")
    thinking: Literal["auto", "on", "off"] = arg(
        default="auto", help="whether the model reasons before it answers; auto is what its template does by itself"
    )
    max_tokens: int = arg(default=1024, help="at most so many tokens per answer")
    temperature: float = arg(default=0.7, help="0 takes the likeliest token, 1 the model's own distribution")
    top_k: int | None = arg(default=None, help="only the k likeliest tokens")
    top_p: float | None = arg(default=0.95, help="only the likeliest tokens that together hold this probability")
    min_p: float | None = arg(default=None, help="only tokens at least this fraction as likely as the likeliest")
    repetition_penalty: float = arg(default=1.0, help="above 1 makes tokens seen before less likely")
    seed: int | None = arg(default=None, help="the same seed and the same words give the same answers")
    dtype: Literal["auto", "bfloat16", "float32"] = arg(default="auto", help="of the weights; auto is as stored")
    recipe: str | None = arg(default=None, help="number format, such as int8 or int4; the model's own if not given")
    device: str = arg(default="auto", help="cpu, cuda, cuda:1 ...; auto is the GPU if there is one")

    def __post_init__(self) -> None:
        sampling(self)


def sampling(inputs: Inputs) -> Sampling:
    """The settings that the options ask for.

    Raises: ValueError naming the option that makes no sense.
    """
    shared = {f.name for f in fields(Sampling)} & {f.name for f in fields(Inputs)}
    return Sampling(**{name: getattr(inputs, name) for name in shared})


def run(inputs: Inputs) -> Report:
    """Load the model and talk until the user leaves."""
    on_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    screen: Screen = Terminal() if on_terminal else Lines()
    model = load(inputs.checkpoint, device=inputs.device, dtype=inputs.dtype, recipe=inputs.recipe)
    thinks = None if inputs.thinking == "auto" else inputs.thinking == "on"
    conversation = Conversation(Engine(model), sampling(inputs), system=inputs.system, thinks=thinks)
    chat = Chat(conversation, screen, inputs.session)
    if inputs.session is not None and inputs.session.exists():
        chat.load(str(inputs.session))
        if inputs.system:
            conversation.instruct(inputs.system)
    screen.tell(f"{model.config.name or inputs.checkpoint}: {len(model.config.layers)} layers; /help lists commands")
    with _handling(signal.SIGTERM, _leave):
        chat.run()
    return chat.report(f"chat {inputs.checkpoint}")


class Chat:
    """A conversation on a screen: lines in, answers and commands out."""

    def __init__(self, conversation: Conversation, screen: Screen, file: Path | None = None) -> None:
        """
        Args:
            conversation: the talk.
            screen: where it is seen.
            file: saved to after each turn.
        """
        self.conversation, self.screen, self.file = conversation, screen, file
        self.completions: list[Completion] = []
        self.is_over = False

    def run(self) -> None:
        """Take lines until there are no more, or /quit."""
        while not self.is_over and (line := self.screen.ask()) is not None:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self.command(line)
                elif line.strip():
                    # a doubled slash says a line that begins with one
                    self.turn(line.removeprefix("/") if line.startswith("//") else line)
            except (ValueError, OSError) as error:
                self.screen.tell(f"error: {error}")

    def turn(self, text: str) -> None:
        """One question and its answer; Ctrl-C ends the answer, and what there is of it stays."""
        stream = self.conversation.ask(text)
        pressed: list[bool] = []

        def interrupt(signum: int, frame: FrameType | None) -> None:
            # between two tokens nothing is lost; who presses twice does not want to wait for that
            if pressed:
                raise KeyboardInterrupt
            pressed.append(True)

        with _handling(signal.SIGINT, interrupt):
            try:
                self.screen.answer(_until(stream, pressed))
            except KeyboardInterrupt:
                pressed.append(True)
            stream.close()
        completion = self.conversation.settle(stream)
        self.completions.append(completion)
        self.screen.tell(status(completion, self.conversation.session.size()))
        if self.file is not None:
            self.conversation.session.save(self.file, self.conversation.engine.model)

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says.

        Raises: ValueError for an unknown command or setting.
        """
        word, _, rest = line[1:].strip().partition(" ")
        if word not in COMMANDS:
            near = nearest(word, COMMANDS)
            raise ValueError(f"there is no /{word}" + (f", did you mean /{near}?" if near else "; see /help"))
        COMMANDS[word][2](self, rest.strip())

    def help(self, _: str) -> None:
        """List the commands."""
        wide = max(len(name) + len(words) for name, (words, _, _) in COMMANDS.items()) + 2
        lines = [f"{f'/{name} {words}':<{wide}}  {what}" for name, (words, what, _) in COMMANDS.items()]
        self.screen.tell(
            "\n".join([*lines, "Ctrl-C stops an answer, Ctrl-D leaves; //text says a line beginning with /"])
        )

    def reset(self, _: str) -> None:
        """Begin anew."""
        self.conversation.reset()
        self.screen.tell("a new conversation")

    def save(self, path: str) -> None:
        """Write the session."""
        file = Path(path) if path else self.file
        if file is None:
            raise ValueError("where to? /save FILE")
        session = self.conversation.session
        n_bytes = session.save(file, self.conversation.engine.model)
        self.screen.tell(f"{len(session.ids):,} tokens saved to {file}: {size(n_bytes)} ({parts(session.size())})")

    def load(self, path: str) -> None:
        """Go on from a session's file."""
        if not path:
            raise ValueError("from where? /load FILE")
        session = Session.load(path, self.conversation.engine.model)
        self.conversation.session = session
        turns = sum(message["role"] == "user" for message in session.messages)
        self.screen.tell(
            f"{turns} turn{'s' * (turns != 1)}, {len(session.ids):,} tokens from {path} ({parts(session.size())})"
        )

    def system(self, text: str) -> None:
        """Set the system text."""
        self.conversation.instruct(text)
        self.screen.tell("system text set; all is read again" if text else "no system text")

    def set(self, word: str) -> None:
        """Change one of the settings, or show them."""
        now = self.conversation.sampling
        field, _, value = (part.strip() for part in word.partition("="))
        if word and value in ("", "off", "none"):
            names = [f.name for f in fields(Sampling)]
            if field not in names or not value:
                raise ValueError(f"{word!r}: write /set NAME=VALUE with one of {', '.join(names)}")
            now = replace(now, **{field: getattr(Sampling(), field)})
        elif word:
            now = replace(now, **{field: getattr(read_settings(Sampling, None, [f"{field}={value}"]), field)})
        self.conversation.sampling = now
        self.screen.tell(", ".join(f"{f.name}={getattr(now, f.name)}" for f in fields(now)))

    def quit(self, _: str) -> None:
        """Leave."""
        self.is_over = True

    def report(self, title: str) -> Report:
        """What was said, and how fast."""
        report = Report(title)
        n_new = sum(c.usage.completion_tokens for c in self.completions)
        decode_s = sum(c.timings.decode_s for c in self.completions)
        report.add("answers", len(self.completions))
        report.add("generated tokens", n_new, "tokens")
        report.add("prompt tokens read", sum(c.usage.prompt_tokens - c.usage.cached_tokens for c in self.completions))
        report.add("prompt tokens reused", sum(c.usage.cached_tokens for c in self.completions))
        if decode_s > 0:
            report.add("decode speed", (n_new - len(self.completions)) / decode_s, "tokens/s")
        cache = self.conversation.session.size()
        report.add("cache of constant size", cache.state_bytes, "bytes")
        report.add("cache that grows with the context", cache.kv_bytes, "bytes")
        return report


# name -> (its words, what it does, how)
COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], None]]] = {
    "help": ("", "this list", Chat.help),
    "reset": ("", "begin a new conversation", Chat.reset),
    "system": ("TEXT", "tell the model how to behave; without a text, nothing", Chat.system),
    "set": ("NAME=VALUE", "change a setting, such as temperature=0.2 or top_k=off; alone, show all", Chat.set),
    "save": ("FILE", "keep this conversation, with all that the model remembers of it", Chat.save),
    "load": ("FILE", "go on with a kept conversation", Chat.load),
    "quit": ("", "leave", Chat.quit),
}


def status(completion: Completion, cache: CacheSize) -> str:
    """One line on speed and memory."""
    usage = completion.usage
    read = usage.prompt_tokens - usage.cached_tokens
    return (
        f"{usage.completion_tokens:,} tokens ({completion.finish_reason})"
        f", {completion.decode_tokens_per_s:.1f} tokens/s"
        f" | read {read:,} of {usage.prompt_tokens:,} in {completion.timings.prefill_s:.2f} s"
        f" | cache {size(cache.n_bytes)} ({parts(cache)})"
    )


def parts(cache: CacheSize) -> str:
    """The two parts of a cache in words."""
    return f"{size(cache.state_bytes)} constant state + {size(cache.kv_bytes)} attention"


def _until(stream: TextStream, pressed: list[bool]) -> Iterator[str]:
    for piece in stream:
        yield piece
        if pressed:
            return


@contextmanager
def _handling(signum: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(INTERRUPTED)
