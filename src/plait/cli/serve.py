"""`plait serve`: answer OpenAI's routes with a model, show a chat page, stop without losing what was begun."""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plait import __version__
from plait.cli.drawing import count, size
from plait.cli.launch import arg
from plait.config import bytes_of
from plait.engine.core import Limits as CacheLimits
from plait.engine.engine import Engine
from plait.engine.request import FinishReason
from plait.engine.worker import Worker
from plait.formats.checkpoint import load
from plait.model.paged import PAGE
from plait.report import Report
from plait.text.reasoning import switch_of

if TYPE_CHECKING:
    from plait.serve.metrics import Metrics
    from plait.serve.served import Served

log = logging.getLogger("plait.serve")

# what figures may name in front of a fleet
PATHS = (
    "/",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
    "/v1/sessions",
)

EXAMPLE = """plait serve path/to/checkpoint      (then open http://127.0.0.1:8000)
  plait serve path/to/checkpoint --port 9000 --recipe int8 --context 32768 --api-key-file keys.txt
  plait serve path/to/checkpoint --host 0.0.0.0 --api-key SECRET --replicas 2
  curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "def f(", "max_tokens": 32}'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What is served, to whom, and how much of it."""

    checkpoint: Path = arg(help="folder of the model", positional=True)
    host: str = arg(default="127.0.0.1", help="address to listen at; 0.0.0.0 is all of this machine's")
    port: int = arg(default=8000, help="0 takes a free one")
    socket: Path | None = arg(default=None, help="listen at a Unix socket of this path instead")
    name: str | None = arg(default=None, help="what requests call the model; by default the checkpoint's folder")
    api_key: str | None = arg(default=None, help="key that requests must bring; or in the variable PLAIT_API_KEY")
    api_key_file: Path | None = arg(default=None, help="file of such keys, one a line")
    hosts: tuple[str, ...] = arg(default=(), help="names of this server in requests, beside those of this machine")
    origins: tuple[str, ...] = arg(default=(), help="web pages elsewhere that may ask, such as https://example.org")
    context: int | None = arg(
        default=None, help="tokens of prompt and answer; by default what the model was trained for"
    )
    max_batch: int = arg(default=64, help="answers that are made at the same time")
    max_waiting: int = arg(default=32, help="answers that may wait besides; then requests are told to come again (429)")
    max_answers: int = arg(default=16, help="answers of one request")
    max_tokens: int | None = arg(
        default=None, help="of an answer whose request names no length; all that fit otherwise"
    )
    max_body: str = arg(default="4MiB", help="size of a request")
    timeout: float = arg(default=600.0, help="seconds for one request, waiting included")
    drain: float = arg(default=60.0, help="seconds for requests to end after a signal to stop")
    cache: str = arg(
        default="1GiB", help="memory for states, keys and values; copies beside it may take 1.25 times as much"
    )
    state: Literal["fp32", "bf16", "fp16-sr", "int8-sr"] = arg(default="fp32", help="numbers in which states are kept")
    kv: Literal["auto", "bf16", "fp8", "int8"] = arg(default="auto", help="numbers in which keys and values are kept")
    guesses: int = arg(default=0, help="coming tokens that are guessed and checked per step (speculation); 0 is none")
    dtype: Literal["auto", "bfloat16", "float32"] = arg(default="auto", help="of the weights; auto is as stored")
    recipe: str | None = arg(default=None, help="number format, such as int8 or int4; the model's own if not given")
    draft: Path | None = arg(default=None, help="smaller model that guesses; without it the text so far is looked up")
    device: tuple[str, ...] = arg(
        default=("auto",), help="cpu, cuda:1 ...; auto is a GPU if there is one; of each replica"
    )
    sessions: Path | None = arg(default=None, help="folder in which conversations are kept; without it none are")
    replicas: int = arg(default=1, help="engines behind the one address, a process each")
    replica: int = arg(default=0, help="which of them this process is; set by the one in front")

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_answers", "timeout", "drain", "replicas")
        for field in (*counts, *(f for f in ("context", "max_tokens") if getattr(self, f) is not None)):
            if not getattr(self, field) > 0:
                raise ValueError(f"--{field.replace('_', '-')} {getattr(self, field)}: must be above 0")
        if self.draft is not None and not self.guesses:
            raise ValueError(f"--draft {self.draft}: say how many tokens it may guess, such as --guesses 7")
        for field in ("max_waiting", "guesses"):
            if getattr(self, field) < 0:
                raise ValueError(f"--{field.replace('_', '-')} {getattr(self, field)}: must be at least 0")
        for field, least in (("cache", 1), ("max_body", 1024)):
            value = getattr(self, field)
            try:
                if bytes_of(value) < least:
                    raise ValueError(f"at least {least} bytes are needed")
            except ValueError as error:
                raise ValueError(f"--{field.replace('_', '-')}: {error}") from None
        if not self.checkpoint.exists():
            raise FileNotFoundError(2, os.strerror(2), str(self.checkpoint))

    def device_of(self, replica: int) -> str:
        """Where a replica runs: the devices in turn."""
        return self.device[replica % len(self.device)]

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.name or self.checkpoint.resolve().name


def run(inputs: Inputs) -> Report:
    """Serve until a signal; the report says how it went."""
    try:
        from plait.serve.app import LOOPBACK, application, opened
        from plait.serve.fleet import Fleet
        from plait.serve.frame import Frame
        from plait.serve.keys import Keys
        from plait.serve.limits import Limits
        from plait.serve.relay import Relay
        from plait.serve.served import House, Served
        from plait.serve.server import Alone, Server, address_of, bind
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing; pip install 'plait[serve]'", name=error.name) from None
    keys = Keys.open(inputs.api_key or os.environ.get("PLAIT_API_KEY") or None, inputs.api_key_file)
    limits = Limits(
        body_bytes=bytes_of(inputs.max_body),
        answers=inputs.max_answers,
        default_tokens=inputs.max_tokens,
        seconds=inputs.timeout,
        open=inputs.max_batch + inputs.max_waiting,
    )
    is_local = inputs.socket is not None or inputs.host in (*LOOPBACK, "::1")
    # a stranger's page can make its own name point here; a key, or a name that is not ours, keeps it out
    hosts = {*LOOPBACK, inputs.host, *inputs.hosts} if is_local and not keys.are_needed and not inputs.socket else ()
    sock = bind(inputs.host, inputs.port, inputs.socket)
    address = address_of(sock)
    log.info("%s: loading %s; /ready says when it is done", address, inputs.checkpoint)
    if not is_local and not keys.are_needed:
        log.warning("anybody who reaches %s may use it; --api-key or --api-key-file asks for a key", address)
    began = time.perf_counter()

    def tell() -> None:
        log.info(
            "ready after %.1f s: %s (the chat page), %s/v1 (OpenAI)", time.perf_counter() - began, address, address
        )

    def tell_of(found: Served) -> None:
        # what is there now stays: the collector need not look at it in the middle of a stream
        gc.collect()
        gc.freeze()
        for line in story(found.worker.engine, found.context, inputs):
            log.info("%s", line)
        tell()

    if inputs.replicas > 1:
        threads = max((os.cpu_count() or 1) // inputs.replicas, 1)
        house = relay = Relay(Fleet(replica_command(inputs), inputs.replicas, threads), limits, keys, tell)
        life, app = relay, Frame(opened(relay, inputs.origins), relay, hosts, PATHS)
    else:
        house = House(limits, keys)
        life = Alone(house, lambda: serve_one(inputs), tell_of)
        app = application(house, __version__, hosts=hosts, origins=inputs.origins)
    Server(life, app, sock, inputs.drain).run()
    return report(f"serve {inputs.checkpoint}", house.metrics)


def serve_one(inputs: Inputs) -> "Served":
    """Load the model, and start its engine."""
    from plait.serve.served import Served
    from plait.serve.sessions import Sessions

    model = load(inputs.checkpoint, device=inputs.device_of(inputs.replica), dtype=inputs.dtype, recipe=inputs.recipe)
    limits = CacheLimits(
        cache_bytes=bytes_of(inputs.cache),
        max_running=inputs.max_batch,
        guesses=inputs.guesses,
        state=inputs.state,
        kv=inputs.kv,
    )
    draft = None
    if inputs.draft is not None:
        draft = load(inputs.draft, device=inputs.device_of(inputs.replica), dtype=inputs.dtype)
    engine = Engine(model, limits=limits, draft=draft)
    room = engine.capacity
    context = inputs.context or min(model.config.max_context, room or model.config.max_context)
    if room is not None and context > room:
        raise ValueError(
            f"--context {context}: a cache of {inputs.cache} holds {room} tokens; give it more with --cache"
        )
    sessions = None if inputs.sessions is None else Sessions(inputs.sessions, engine)
    return Served.of(Worker(engine), inputs.model_name, context, facts(engine), sessions)


def replica_command(inputs: Inputs) -> Callable[[int, Path], list[str]]:
    """The words that start a replica: ours, but with a socket of its own, and no keys, which are asked for in front."""
    ours = (
        "host",
        "port",
        "socket",
        "api_key",
        "api_key_file",
        "hosts",
        "origins",
        "replicas",
        "replica",
        "checkpoint",
    )
    words = [sys.executable, "-m", "plait", "serve", str(inputs.checkpoint), "--name", inputs.model_name]
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if field.name not in (*ours, "name") and value not in (None, field.default):
            shown = ",".join(value) if isinstance(value, tuple) else str(value)
            words += ["--" + field.name.replace("_", "-"), shown]
    return lambda index, socket: [*words, "--socket", str(socket), "--replica", str(index)]


def facts(engine: Engine) -> Mapping[str, object]:
    """What /v1/models tells of a model besides."""
    config, pool = engine.model.config, engine.core.pool
    template = None if engine.tokenizer is None else engine.tokenizer.chat_template
    return {
        "pattern": config.pattern,
        "parameters": config.cost().params,
        "state_bytes": pool.slot_bytes,
        "kv_bytes_per_token": pool.page_bytes // PAGE,
        "thinking": template is not None and switch_of(template) is not None,
    }


def story(engine: Engine, context: int, inputs: Inputs) -> list[str]:
    """What runs, in lines for the log."""
    model, load, pool = engine.model, engine.load(), engine.core.pool
    config, state, kv = model.config, pool.slot_bytes, pool.page_bytes // PAGE
    return [
        f"{inputs.model_name}: {config.pattern}, {count(config.cost().params)} parameters, "
        f"{model.recipe.name} on {model.device}, computing in {str(model.recipe.compute).removeprefix('torch.')}",
        f"an answer holds {size(state)} of state and {size(kv)} per token: {size(state + kv * context)} at {context:,} "
        f"tokens",
        f"a cache of {inputs.cache} has {load.slots_total:,} slots of state and {load.pages_total:,} pages of "
        f"{load.page_tokens} tokens; {inputs.max_batch} answers at one time, {inputs.max_waiting} may wait",
    ]


def report(title: str, metrics: "Metrics") -> Report:
    """How it went, from the server's own figures."""
    found = Report(title)
    ends = {name: metrics.value("plait_answers_total", reason=name) for name in FinishReason}
    whole = ends[FinishReason.STOP] + ends[FinishReason.LENGTH]
    found.add("requests answered", metrics.n_answered)
    # in front of a fleet nobody counts tokens
    if sum(ends.values()):
        found.add("answers", round(whole))
        found.add("answers that were broken off", round(sum(ends.values()) - whole))
    found.add("requests turned away when full", round(metrics.value("plait_requests_refused_total")))
    n = metrics.value("plait_time_to_first_token_seconds_count")
    if n:
        found.add("time to first token, mean", metrics.value("plait_time_to_first_token_seconds_sum") / n, "s")
    return found
