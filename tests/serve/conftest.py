"""A server on a free port with a tiny model behind it, and one whose engine does what a test says."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import httpx
import openai
import pytest

from plait.engine.engine import Engine
from plait.engine.request import FinishReason, Load, Request, Usage
from plait.engine.sequence import Delta, Handle
from plait.engine.worker import Worker
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.serve.app import application
from plait.serve.keys import Keys
from plait.serve.limits import Limits
from plait.serve.served import House, Served
from plait.serve.server import Alone, Server, address_of, bind
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over the lazy dog; ein süßer Bär läuft über die Straße. 你好，世界 🦊🐻 " * 3
CONTEXT = 1024


@dataclass(slots=True)
class Running:
    """A server in a thread."""

    url: str
    house: House
    server: Server
    thread: threading.Thread
    errors: list[BaseException] = field(default_factory=list)

    @property
    def client(self) -> openai.OpenAI:
        """The official client; it does not try again, so that tests see every error."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


def run_server(
    load: Callable[[], Served], limits: Limits | None = None, keys: Keys | None = None, drain_s: float = 10, **settings
) -> Running:
    """Start a server and wait until it listens."""
    house = House(limits or Limits(context=CONTEXT), keys or Keys())
    sock = bind("127.0.0.1", 0)
    server = Server(Alone(house, load), application(house, "0", **settings), sock, drain_s)
    running = Running(address_of(sock), house, server, threading.Thread())

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            running.errors.append(error)

    running.thread = threading.Thread(target=run, daemon=True)
    running.thread.start()
    for _ in range(200):
        try:
            httpx.get(f"{running.url}/health")
            break
        except httpx.HTTPError:
            time.sleep(0.02)
    return running


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([WORDS], 340)


@pytest.fixture(scope="session")
def tiny_engine(tokenizer: Tokenizer) -> Callable[..., Engine]:
    """An engine over a small hybrid with random weights."""

    def make(**settings) -> Engine:
        sizes = {
            "vocab_size": 384,
            "d_model": 32,
            "init_std": 0.3,
            "max_context": CONTEXT,
            "mamba2": {"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
            "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
            "mlp": {"d_ff": 64},
        }
        model = build(ModelConfig.from_pattern("M*-", **sizes), recipe="fp32", seed=0)
        return Engine(model, tokenizer, **settings)

    return make


@pytest.fixture(scope="module")
def live(tiny_engine: Callable[..., Engine]) -> Iterator[Running]:
    """A server over the tiny model."""
    running = run_server(lambda: Served.of(Worker(tiny_engine()), "tiny", CONTEXT))
    wait_until(lambda: running.house.phase == "ready")
    yield running
    running.stop()


class FakeWorker:
    """Stands for an engine: says "ab " again and again, as fast as it is told, and remembers who was cancelled."""

    def __init__(self, tokenizer: Tokenizer, pause_s: float = 0.0) -> None:
        self.engine = SimpleNamespace(
            tokenizer=tokenizer, model=SimpleNamespace(config=SimpleNamespace(vocab_size=tokenizer.vocab_size))
        )
        self.pause_s = pause_s
        self.is_alive, self.failure = True, None
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self.cancelled: list[str] = []

    def load(self) -> Load:
        return Load(running=len(self.open), prefix_hits=3, prefix_misses=1)

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        self.is_alive = False
        return True

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        handle = Handle(request, request.request_id, 0.0)
        self.open.add(request.request_id)
        try:
            n = request.sampling.max_tokens
            for i in range(n):
                await asyncio.sleep(self.pause_s)
                if not self.is_alive:
                    yield Delta(handle=handle, finish_reason=FinishReason.CANCELLED)
                    return
                for index in range(request.n):
                    last = i + 1 == n
                    usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=n) if last else None
                    reason = FinishReason.LENGTH if last else None
                    yield Delta(
                        handle=handle, index=index, text="ab ", token_ids=(5,), finish_reason=reason, usage=usage
                    )
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.open.discard(request.request_id)


@pytest.fixture
def fake(tokenizer: Tokenizer) -> Iterator[Callable[..., tuple[Running, FakeWorker]]]:
    """Servers over fakes; all of them end with the test."""
    started: list[Running] = []

    def make(pause_s: float = 0.0, **settings) -> tuple[Running, FakeWorker]:
        worker = FakeWorker(tokenizer, pause_s)
        running = run_server(lambda: Served.of(worker, "fake", CONTEXT), **settings)  # type: ignore[arg-type]
        started.append(running)
        wait_until(lambda: running.house.phase == "ready")
        return running, worker

    yield make
    for running in started:
        running.stop()
