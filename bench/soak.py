"""Keeps a server busy for minutes and counts what was lost: streams, overload, kill -9.

    python bench/soak.py streams  --minutes 10 --streams 64
    python bench/soak.py overload --minutes 5 --times 10
    python bench/soak.py kill     --kills 5

A server over a small model of its own is started (or another checkpoint's: --checkpoint), with two replicas by
--replicas 2, and asked by the client of `plait bench serve` in a process of its own.

    streams    N clients ask without a pause, each answer as long as was asked for; lost or stuck requests, and memory
               of the server (all of its processes) after a warm-up of a fifth of the time: last quarter against first
    overload   first as many clients as there are places, then arrivals at `times` the rate at which those were served:
               how soon a 429 came, how much longer accepted answers took, whether any was lost
    kill       the server is killed while it answers, and started again: /ready says no until it can, sessions that were
               saved are there, whole
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil

from plait.cli.benches.serve_client import REFUSED, Heard, Target, get, hear
from plait.cli.benches.serve_load import arrivals, open_loop
from plait.report import Report, provenance

WORDS = "the state of a hybrid is small and does not grow while its answer does".split()


def small(folder: Path) -> Path:
    """A hybrid of half a million numbers with random weights, and a tokenizer; its answers are never worth reading."""
    from plait.formats.checkpoint import save
    from plait.model.config import ModelConfig
    from plait.model.hybrid import build
    from plait.text.bpe import train_bpe

    config = ModelConfig.from_pattern(
        "M-M*-M",
        vocab_size=512,
        d_model=64,
        max_context=4096,
        mamba2={"n_heads": 4, "head_dim": 32, "d_state": 16, "n_groups": 1},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
        mlp={"d_ff": 128},
    )
    save(build(config, recipe="fp32", seed=0), folder, format="native")
    train_bpe([" ".join(WORDS) * 20], 300).save(folder)
    return folder


class Running:
    """A server in a process of its own."""

    def __init__(self, checkpoint: Path, words: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._words = [sys.executable, "-m", "plait", "serve", str(checkpoint), "--port", str(self.port), *words]
        self.url = f"http://127.0.0.1:{self.port}"
        self.target = Target(
            url=self.url, name="server", model=checkpoint.name, api="completions", dialect="ignore_eos"
        )
        self.start()

    def start(self) -> float:
        """Start it, wait until it is ready, and return after how many seconds it was."""
        self.process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.perf_counter()
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}: {' '.join(self._words)}")
            try:
                asyncio.run(get(self.target, "/ready"))
                return time.perf_counter() - began
            except (OSError, RuntimeError, EOFError, TimeoutError, ValueError):
                time.sleep(0.05)

    def memory(self) -> int:
        """Resident bytes of all of its processes."""
        main = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in (main, *main.children(recursive=True)))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        self.process.wait(120)


@contextmanager
def server(args: argparse.Namespace, *words: str) -> Iterator[Running]:
    """A server for the time of a measurement."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or small(Path(folder) / "small")
        running = Running(checkpoint, [*words, "--replicas", str(args.replicas)])
        try:
            yield running
        finally:
            if running.process.poll() is None:
                running.stop()


def drawn(rng: random.Random, longest: int = 200) -> tuple[str, int]:
    """A prompt and the length of its answer."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest))), rng.randint(1, 64)


async def ask(target: Target, prompt: str, length: int, due_s: float = 0.0) -> Heard:
    """One request; an answer that is not as long as was asked for is lost."""
    heard = await hear(target, prompt, length, due_s)
    if heard.error == "empty" and heard.tokens == length:
        # tokens of random weights need not be text
        heard.error = ""
    if not heard.error and heard.tokens != length:
        heard.error = f"{heard.tokens} tokens instead of {length}"
    return heard


async def askers(target: Target, n: int, until_s: float, seed: int) -> list[Heard]:
    """n clients, each asking again as soon as it has its answer, until a time of perf_counter."""
    found: list[Heard] = []

    async def one(i: int) -> None:
        rng = random.Random(seed * 100_003 + i)
        while time.perf_counter() < until_s:
            found.append(await ask(target, *drawn(rng)))

    await asyncio.gather(*(one(i) for i in range(n)))
    return found


def counted(report: Report, heard: list[Heard], name: str) -> list[Heard]:
    """Report how many answers came and how many did not; the ones that did."""
    whole = [h for h in heard if not h.error]
    lost = [h for h in heard if h.error and h.error != REFUSED]
    report.add(f"{name}: answers", len(whole))
    report.add(f"{name}: refused", sum(h.error == REFUSED for h in heard))
    report.add(f"{name}: lost", len(lost))
    for error in sorted({h.error for h in lost})[:5]:
        report.add(f"{name}: lost by {error}", sum(h.error == error for h in lost))
    return whole


async def streams(running: Running, report: Report, n: int, seconds: float) -> None:
    """Many streams at one time, and the server's memory meanwhile."""
    began = time.perf_counter()
    samples: list[tuple[float, int]] = []

    async def watch() -> None:
        while True:
            samples.append((time.perf_counter() - began, running.memory()))
            await asyncio.sleep(max(seconds / 400, 0.25))

    watching = asyncio.create_task(watch())
    heard = await askers(running.target, n, began + seconds, seed=1)
    watching.cancel()
    whole = counted(report, heard, "streams")
    report.add("streams: tokens", sum(h.tokens for h in whole))
    report.add("streams: speed", sum(h.tokens for h in whole) / (time.perf_counter() - began), "tokens/s")
    report.add("streams: longest answer took", max(h.ended_s - h.sent_s for h in whole), "s")
    warm = [size for at, size in samples if at > seconds / 5 and at < seconds]
    quarter = max(len(warm) // 4, 1)
    first, last = statistics.median(warm[:quarter]), statistics.median(warm[-quarter:])
    report.add("streams: memory after warm-up", first, "bytes")
    report.add("streams: growth of memory", 100 * (last / first - 1), "%")


async def overload(running: Running, report: Report, places: int, times: int, seconds: float) -> None:
    """As many clients as there are places; then arrivals at many times the rate at which these were served."""
    began = time.perf_counter()
    fair = counted(report, await askers(running.target, places, began + seconds, seed=2), "at capacity")
    rate = times * len(fair) / (time.perf_counter() - began)
    rng = random.Random(3)
    requests = [drawn(rng) for _ in range(round(rate * seconds))]
    crowd = await open_loop(partial(ask, running.target), requests, arrivals(len(requests), rate, 3))
    report.add("arrivals", rate, "requests/s")
    whole = counted(report, crowd, f"{times} times as many")
    # answers differ in length, so that their time is told per token
    usual, busy = ([(h.ended_s - h.sent_s) / (h.tokens + 8) for h in each] for each in (fair, whole))
    report.add("accepted answers took", statistics.median(busy) / statistics.median(usual), "times as long (median)")
    ninety = [statistics.quantiles(each, n=10)[-1] for each in (usual, busy)]
    report.add("and their slowest tenth", ninety[1] / ninety[0], "times as long")
    refused = sorted(h.ended_s - h.sent_s for h in crowd if h.error == REFUSED)
    if refused:
        report.add("a refusal came after, median", 1e3 * statistics.median(refused), "ms")
        report.add("99 % of them within", 1e3 * refused[int(0.99 * (len(refused) - 1))], "ms")
        report.add("all of them within", 1e3 * refused[-1], "ms")


def kill(running: Running, report: Report, kills: int) -> None:
    """Kill it while it answers, start it again, look at its sessions."""
    import httpx

    lost, ready_s = 0, []
    kept: dict[str, int] = {}
    for round in range(kills):
        session = httpx.post(f"{running.url}/v1/sessions", json={}).json()["id"]
        for turn in range(2):
            body = {"messages": [{"role": "user", "content": f"{round} {turn}"}], "session": session, "max_tokens": 8}
            httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        kept[session] = 4
        load = subprocess.Popen(
            [sys.executable, __file__, "load", "--url", running.url, "--model", running.target.model],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(1 + random.random())
        running.stop(signal.SIGKILL)
        load.wait(60)
        ready_s.append(running.start())
        for session, n_messages in kept.items():
            found = httpx.get(f"{running.url}/v1/sessions/{session}", timeout=30).json()
            lost += len(found.get("messages", ())) != n_messages
    report.add("kills", kills)
    report.add("sessions", len(kept))
    report.add("sessions lost or broken, over all restarts", lost)
    report.add("ready again after, longest", max(ready_s), "s")


def main() -> None:
    """Read the words, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["streams", "overload", "kill", "load"])
    parser.add_argument("--checkpoint", type=Path, help="whose model; by default a small one made up")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--places", type=int, default=16, help="of the overloaded server")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--cache", default="32MiB", help="of the server's states, keys and values")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--url", help="of a server that runs already (load)")
    parser.add_argument("--model", default="")
    parser.add_argument("--save", type=Path, help="JSON lines to append to")
    args = parser.parse_args()
    if args.what == "load":
        target = Target(url=args.url, name="", model=args.model, api="completions", dialect="ignore_eos", patience_s=20)
        asyncio.run(askers(target, 8, time.perf_counter() + 5, seed=4))
        return
    report = Report(f"soak {args.what}", provenance=provenance(0))
    seconds = 60 * args.minutes
    if args.what == "streams":
        with server(args, "--cache", args.cache) as running:
            asyncio.run(streams(running, report, args.streams, seconds))
    elif args.what == "overload":
        waiting = args.places // 4
        words = ["--cache", args.cache, "--max-batch", str(args.places - waiting), "--max-waiting", str(waiting)]
        with server(args, *words) as running:
            asyncio.run(overload(running, report, args.places * args.replicas, args.times, seconds / 2))
    else:
        with tempfile.TemporaryDirectory() as folder, server(args, "--sessions", folder) as running:
            kill(running, report, args.kills)
    print(report.table())
    if args.save:
        with args.save.open("a") as file:
            file.write(json.dumps(report.to_dict()) + "\n")


if __name__ == "__main__":
    main()
