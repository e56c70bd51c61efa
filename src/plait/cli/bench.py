"""`plait bench`: measure speed, correctness first, all sides in turns within one run, beside the machine's limits."""

import importlib
from dataclasses import dataclass, fields
from typing import Literal

from plait.cli.benches import BENCHES
from plait.cli.launch import arg
from plait.report import Report

EXAMPLE = """plait bench decode --model 290m --recipe bf16,int4 --depth 16,8192 --against transformers
  plait bench serve --url http://127.0.0.1:8000 --mix 8192/16384 --rate 0.5,1,2 --chart curve.svg"""
PEERS = {
    "transformers": ("train", "prefill", "decode"),
    "llama.cpp": ("prefill", "decode"),
    "mamba_ssm": ("ops",),
    "fla": ("ops",),
}
# who has a use for a flag; all have one for those that are not named
USERS = {
    "model": ("ops", "train", "prefill", "decode", "device --tune", "serve"),
    "recipe": ("train", "prefill", "decode", "twin", "latency"),
    "against": ("ops", "train", "prefill", "decode", "serve"),
    "tokens": ("ops", "prefill", "device --tune", "latency"),
    "depth": ("decode", "twin"),
    "batch": ("prefill", "decode", "twin", "latency"),
    "steps": ("decode", "twin"),
    "binary": ("prefill", "decode"),
    "gguf": ("prefill", "decode"),
    "patience": ("prefill", "decode", "serve"),
    "tune": ("device",),
    "chart": ("twin", "latency", "serve"),
    "url": ("serve",),
    "mix": ("serve",),
    "rate": ("serve",),
    "concurrency": ("serve",),
    "requests": ("serve",),
    "seed": ("serve", "latency"),
    "api": ("serve",),
    "key": ("serve",),
    "count": ("latency",),
    "library": ("latency",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to measure, on what, and how often."""

    what: Literal["ops", "train", "prefill", "decode", "twin", "latency", "serve", "device"] = arg(
        help="what to measure", positional=True
    )
    model: str = arg(
        default="",
        help="45m, 290m, twin, 2b4t, a preset or a checkpoint's folder; empty for the usual one; serve: what the "
        "server calls it, or NAME,NAME of both servers",
    )
    recipe: tuple[str, ...] = arg(default=(), help="numbers to compute in: bf16, fp32, int8, int4; empty for the usual")
    against: tuple[str, ...] = arg(
        default=(), help="peers to measure in turn: transformers, llama.cpp; ops: mamba_ssm, fla; serve: a second URL"
    )
    tokens: tuple[int, ...] = arg(
        default=(), help="prefill and latency: lengths of the prompt; ops and device --tune: tokens of a call"
    )
    depth: tuple[int, ...] = arg(default=(), help="decode and twin: tokens in the cache before the first step")
    batch: int = arg(default=1, help="prefill, decode, twin and latency: sequences at a time")
    steps: int = arg(default=64, help="decode and twin: tokens per sequence and round")
    rounds: int = arg(default=5, help="counted runs of each side")
    threads: int = arg(default=0, help="processor threads, 0 for all")
    binary: str = arg(default="", help="llama.cpp's llama-bench")
    gguf: str = arg(default="", help="folder of its models, from bench/peers/gguf_models.py")
    patience: float = arg(
        default=60.0, help="seconds that one run of a peer, or one answer, may take; longer ones are left out"
    )
    tune: bool = arg(default=False, help="device: tune the Triton kernels at a model's sizes and keep what is fastest")
    chart: str = arg(default="", help="twin, latency and serve: also draw it into this SVG file")
    count: int = arg(default=30, help="latency: random architectures")
    library: str = arg(default="", help="latency: file of measured blocks to use and fill; empty measures all anew")
    url: str = arg(default="", help="serve: address of a server of OpenAI's protocol")
    mix: str = arg(default="chat", help="serve: chat, or tokens PROMPT/ANSWER, as 65536/1024 or 512/128:3,64/256:1")
    rate: tuple[float, ...] = arg(default=(), help="serve: requests per second that come at random times, a load each")
    concurrency: tuple[int, ...] = arg(default=(), help="serve: askers at a time, a load each; 1,2,4,8 without a rate")
    requests: int = arg(default=32, help="serve: requests of each load and round")
    seed: int = arg(default=0, help="serve: of words, lengths and times; latency: of the architectures")
    api: Literal["chat", "completions"] = arg(default="chat", help="serve: which route is asked")
    key: str = arg(default="", help="serve: API key of both servers")
    save: str = arg(default="", help="also write the report to this file, as JSON lines")

    def __post_init__(self) -> None:
        for field in ("rounds", "batch", "steps", "requests", "count"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: give at least 1")
        self._require_users()
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: give at least 1, or 0 for all")
        for field, least in (("tokens", 1), ("depth", 0)):
            if any(n < least for n in getattr(self, field)):
                raise ValueError(f"{field}={getattr(self, field)}: give numbers of at least {least}")
        if self.what == "serve":
            self._check_serve()
            return
        for peer in self.against:
            if peer not in PEERS:
                raise ValueError(f"against={peer!r} is no peer that we know; known: {', '.join(PEERS)}")
            if self.what not in PEERS[peer]:
                raise ValueError(f"--against {peer} means nothing to `plait bench {self.what}`; {_named(PEERS[peer])}")
        if "llama.cpp" in self.against and not (self.binary and self.gguf):
            raise ValueError(
                "--against llama.cpp needs --binary LLAMA-BENCH and --gguf FOLDER, see bench/peers/README.md"
            )

    def _check_serve(self) -> None:
        if not self.url:
            raise ValueError("url is missing: give the server's address, such as --url http://127.0.0.1:8000")
        if len(self.against) > 1:
            raise ValueError(f"against={self.against}: give one second server")
        for field in ("rate", "concurrency"):
            for value in getattr(self, field):
                if not 0 < value < 1e6:
                    raise ValueError(f"{field}={value}: give a number above 0")

    def _require_users(self) -> None:
        """Refuse flags that would change nothing."""
        mine = (self.what, "device --tune") if self.what == "device" and self.tune else (self.what,)
        for field in fields(self):
            users = USERS.get(field.name, mine)
            if getattr(self, field.name) != field.default and not set(users) & set(mine):
                raise ValueError(f"--{field.name} means nothing to `plait bench {self.what}`; {_named(users)}")


def _named(users: tuple[str, ...]) -> str:
    return "it belongs to " + ", ".join(f"`plait bench {user}`" for user in users)


def run(inputs: Inputs) -> Report:
    """Measure it."""
    if inputs.threads:
        import torch

        torch.set_num_threads(inputs.threads)
    report = importlib.import_module(BENCHES[inputs.what][0]).measure(inputs)
    if inputs.save:
        report.save_jsonl(inputs.save)
    return report
