"""`plait bench serve`: what is asked and when, what is heard, the figures made of it, and servers that misbehave."""

import asyncio
import json
import math
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.page.fake import Fake, Piece

from plait.cli.benches.serve import hash_of
from plait.cli.benches.serve_client import Heard, Target, hear
from plait.cli.benches.serve_figures import Level, quantile, summed
from plait.cli.benches.serve_load import CHAT, Mix, Tokens, arrivals, closed_loop, open_loop, text_of
from plait.cli.launch import launch
from plait.report import Report


def makes(pause_s: float = 0.0, refuses: str = "") -> Callable[[dict[str, Any]], Iterator[Piece]]:
    """A script that makes the number of tokens that was asked for."""

    def script(request: dict[str, Any]) -> Iterator[Piece]:
        if refuses in request:
            yield {"status": 400, "message": f"{refuses} is no field"}
        for i in range(request["max_tokens"]):
            time.sleep(pause_s)
            yield {"content": f"w{i} "}

    return script


def words_of(request: dict[str, Any]) -> int:
    return 5 + 2 * len(request["messages"][0]["content"].split())


@pytest.fixture
def fakes() -> Iterator[Callable[[], Fake]]:
    started: list[Fake] = []

    def make() -> Fake:
        started.append(Fake())
        started[-1].script, started[-1].n_prompt = makes(), words_of
        return started[-1]

    yield make
    for fake in started:
        fake.close()


def test_mixes_are_read_and_drawn_from_a_seed() -> None:
    mix = Mix.read("512/128:3,64/256")
    assert mix.kinds == ((512, 128, 3.0), (64, 256, 1.0)) and mix.longest == 640
    drawn = mix.draw(4000, seed=5)
    share = sum(one.prompt == 512 for one in drawn) / len(drawn)
    # six standard deviations of a draw with p = 3/4
    assert abs(share - 0.75) < 6 * math.sqrt(0.75 * 0.25 / 4000)
    assert drawn == mix.draw(4000, seed=5) != mix.draw(4000, seed=6)
    assert Mix.read("65536/1024").draw(2, 0)[1].answer == 1024


def test_the_mix_of_a_chat_has_its_medians_within_its_bounds() -> None:
    drawn = Mix.read("chat").draw(4001, seed=0)
    for lengths, (median, spread, least, most) in zip(
        ([one.prompt for one in drawn], [one.answer for one in drawn]), CHAT, strict=True
    ):
        assert least <= min(lengths) and max(lengths) <= most
        # the median of n draws has a standard deviation of about 1.25 / sqrt(n) in the logarithm
        assert abs(math.log(statistics.median(lengths) / median)) < 6 * 1.25 * spread / math.sqrt(4001)
    assert max(one.prompt + one.answer for one in drawn) <= Mix.read("chat").longest


@pytest.mark.parametrize(
    "text", ["", "12", "a/b", "0/5", "5/0", "5/-1", "1/1:0", "1/1:nan", "1/1:inf", "1/1,,", "chat/1"]
)
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mix="):
        Mix.read(text)


def test_arrivals_are_poisson() -> None:
    times = arrivals(5000, rate=4.0, seed=1)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert times[0] == 0 and times == arrivals(5000, rate=4.0, seed=1)
    # mean and standard deviation of an exponential distribution are 1 / rate
    assert abs(statistics.mean(gaps) - 0.25) < 6 * 0.25 / math.sqrt(5000)
    assert abs(statistics.stdev(gaps) - 0.25) < 6 * 0.25 * math.sqrt(2 / 5000)


def test_words_are_as_many_as_the_tokens_need_and_never_the_same() -> None:
    tokens = Tokens(fixed=5.0, per_word=2.0)
    assert len(tokens.text(105, seed=1).split()) == 50
    assert tokens.text(1, seed=1) != "" and tokens.text(105, 1) == tokens.text(105, 1)
    assert len({text_of(4, seed) for seed in range(1000)}) > 990
    assert hash_of(0, "a", 1) == hash_of(0, "a", 1) != hash_of(0, "a", 2)


def test_quantiles_are_values_that_were_measured() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert quantile([7.0], 0.5) == quantile([7.0], 0.99) == 7 and quantile([1.0, 2.0], 0.5) == 1


def test_figures_follow_from_times() -> None:
    def heard(due: float, first: float, last: float, tokens: int, error: str = "") -> Heard:
        pieces = [first, *([last] if tokens > 1 else [])]
        return Heard(
            due_s=due, sent_s=due + 9, ended_s=last, pieces_s=pieces, tokens=tokens, prompt_tokens=10, error=error
        )

    done = summed([heard(0, 1, 3, 5), heard(1, 4, 4, 1), heard(2, 3, 9, 4), heard(0, 0, 90, 50, "refused")])
    assert done.ends == {"whole": 3, "refused": 1}
    assert done.figures["time to be refused p50"] == 81_000
    # ten tokens from the first request at 0 to the last piece at 9
    assert done.figures["output tokens/s"] == pytest.approx(10 / 9)
    assert done.figures["input tokens/s"] == pytest.approx(30 / 9)
    # due, not sent: 1, 3 and 1 seconds
    assert [done.figures[f"time to first token p{p}"] for p in (50, 99)] == [1000, 3000]
    assert [done.figures[f"time between tokens p{p}"] for p in (50, 99)] == [500, 2000]
    assert done.figures["longest gap p99"] == 6000 and done.figures["time to the end p50"] == 3000
    assert summed([heard(0, 1, 2, 3, "status 500"), heard(0, 1, 2, 3, "error: x")]).ends == {
        "status 500": 1,
        "error": 1,
    }
    assert summed([heard(0, 1, 2, 3, "timeout")]).figures == {}


def test_an_open_loop_asks_in_time_however_slow_the_answers() -> None:
    at_once, most, due, early = 0, 0, [], []

    async def ask(prompt: str, n: int, due_s: float) -> Heard:
        nonlocal at_once, most
        due.append((prompt, due_s))
        early.append(time.perf_counter() < due_s - 1e-3)
        at_once, most = at_once + 1, max(most, at_once + 1)
        await asyncio.sleep(0.5)
        at_once -= 1
        return Heard(due_s=due_s, text=prompt)

    times = [0.0, 0.01, 0.02, 0.03]
    found = asyncio.run(open_loop(ask, [(f"q{i}", 1) for i in range(4)], times))
    assert most == 4 and not any(early) and [one.text for one in found] == ["q0", "q1", "q2", "q3"]
    assert [round(at - due[0][1], 6) for _, at in sorted(due)] == times


def test_a_closed_loop_has_so_many_askers_and_asks_all() -> None:
    at_once, most = 0, 0

    async def ask(prompt: str, n: int, due_s: float) -> Heard:
        nonlocal at_once, most
        at_once, most = at_once + 1, max(most, at_once + 1)
        await asyncio.sleep(0.001 * n)
        at_once -= 1
        return Heard(due_s=due_s, text=prompt)

    found = asyncio.run(closed_loop(ask, [(f"q{i}", 10 - i) for i in range(10)], askers=3))
    assert most == 3 and [one.text for one in found] == [f"q{i}" for i in range(10)]


def test_a_piece_is_heard_when_it_comes(fakes: Callable[[], Fake]) -> None:
    fake = fakes()
    fake.script = makes(pause_s=0.05)
    begin = time.perf_counter()
    heard = asyncio.run(hear(Target(url=fake.url, name="x", model="m", dialect="ignore_eos"), "a b", 5))
    assert heard.error == "" and heard.tokens == len(heard.pieces_s) == 5 and heard.prompt_tokens == 9
    assert heard.cached_tokens == 7 and heard.text == "w0 w1 w2 w3 w4 "
    assert begin + 0.05 <= heard.pieces_s[0] and heard.pieces_s[-1] - heard.pieces_s[0] >= 0.19
    (request,) = fake.requests
    assert request["ignore_eos"] is True and request["temperature"] == 0 and request["max_tokens"] == 5
    assert request["messages"] == [{"role": "user", "content": "a b"}] and request["stream"] is True


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([{"status": 429, "message": "full"}], "refused"),
        ([{"status": 503, "message": "later"}], "refused"),
        ([{"status": 500, "message": "oh"}], "status 500"),
        ([{"content": "a"}, {"error": {"message": "out of memory"}}], "error: {'message': 'out of memory'}"),
        ([{"content": "a"}, {"cut": True}], "cut off"),
        ([{"content": ""}], "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_is_named(fakes: Callable[[], Fake], pieces: list[Piece], error: str) -> None:
    fake = fakes()
    fake.script = lambda _: iter(pieces)
    assert asyncio.run(hear(Target(url=fake.url, name="x"), "a", 5)).error == error


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", "connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata: {\n\n", "not the protocol"),
        (b"nonsense\r\n\r\n", "not the protocol"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "not the protocol"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nabc", "connection"),
        (None, "timeout"),
    ],
)
def test_a_server_that_is_none_is_no_fault_of_ours(said: bytes | None, error: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection = listener.accept()[0]
            with connection:
                connection.recv(1 << 16)
                if said is None:
                    time.sleep(0.5)
                else:
                    connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        target = Target(url=f"http://127.0.0.1:{listener.getsockname()[1]}", name="x", patience_s=0.2)
        assert asyncio.run(hear(target, "a", 5)).error.startswith(error)
        thread.join()
    closed = Target(url=target.url, name="x")
    assert asyncio.run(hear(closed, "a", 5)).error.startswith("connection: ConnectionRefused")


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    status = launch(["bench", "serve", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    return status, {fact["name"]: fact["value"] for fact in report.get("facts", [])} | report, err


def test_two_servers_are_asked_the_same_in_turns(
    fakes: Callable[[], Fake], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quick, slow = fakes(), fakes()
    slow.script = makes(pause_s=0.01)
    chart, saved = tmp_path / "charts" / "c.svg", tmp_path / "r.jsonl"
    words = ["--url", quick.url, "--against", slow.url + "v1", "--mix", "35/6,25/4", "--requests", 4, "--rounds", 2]
    status, found, _ = bench(
        capsys, *words, "--concurrency", 2, "--rate", 50, "--chart", chart, "--save", saved, "--seed", 3
    )
    assert status == 0
    asked = [[(r["messages"], r["max_tokens"]) for r in fake.requests] for fake in (quick, slow)]
    # the same words, apart from the two probes of how many tokens a word has
    first = [one for one in asked[0] if one[1] in (4, 6)]
    assert sorted(map(str, first)) == sorted(str(one) for one in asked[1] if one[1] in (4, 6)) and len(first) == 16
    assert len({str(one) for one in first}) == 16, "no words come twice"
    assert {len(one[0][0]["content"].split()) for one in first} == {10, 15}, "35 and 25 tokens"
    assert found["tokens per word"] == 2 and found["greedy answers agree"] is True
    for level in ("concurrency 2", "rate 50/s"):
        assert found[f"{level} server whole answers"] == found[f"{level} against whole answers"] == 8
        assert found[f"{level} server failed"] == found[f"{level} server refused"] == 0
        assert found[f"{level} against time between tokens p50"] >= 10
        assert f"{level} server / against, output tokens/s" in found
    svg = chart.read_text()
    assert svg.startswith("<svg") and svg.count("<polyline") == 8 and "tokens/s" in svg
    assert Report.load_jsonl(saved).to_dict()["facts"] == found["facts"]


def test_the_table_shows_what_was_refused_and_what_failed(
    fakes: Callable[[], Fake], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fake = fakes()
    turns = iter(range(10**6))

    def moody(request: dict[str, Any]) -> Iterator[Piece]:
        # the first three are asked before anything is measured
        n = next(turns)
        if n >= 3 and n % 4 == 0:
            return iter([{"status": 429, "message": "full"}])
        return iter([{"content": "x"}, {"cut": True}]) if n >= 3 and n % 4 == 1 else makes()(request)

    fake.script = moody
    words = ["--url", fake.url, "--mix", "30/3", "--requests", 8, "--rounds", 1, "--concurrency", 1]
    assert launch(["bench", "serve", *map(str, words)]) == 0
    out, _ = capsys.readouterr()
    row = next(line.split() for line in out.splitlines() if line.startswith("concurrency 1"))
    assert row[2:6] == ["server", "4", "2", "2"] and "2 refused, 2 cut off" in caplog.text


@pytest.mark.parametrize(("refuses", "then"), [("ignore_eos", "generation_config"), ("", "ignore_eos")])
def test_each_server_is_told_in_its_own_words_to_go_on(
    fakes: Callable[[], Fake], capsys: pytest.CaptureFixture[str], refuses: str, then: str
) -> None:
    fake = fakes()
    fake.script = makes(refuses=refuses or "nothing")
    words = ["--url", fake.url, "--mix", "30/3", "--requests", 1, "--rounds", 1, "--concurrency", 1]
    status, found, _ = bench(capsys, *words)
    assert status == 0 and found["server answers have the length that was asked for"] is True
    assert then in fake.requests[-1] and found["concurrency 1 server whole answers"] == 1


def test_a_server_that_ends_early_is_told_apart(fakes: Callable[[], Fake], capsys: pytest.CaptureFixture[str]) -> None:
    fake = fakes()
    fake.script = lambda request: iter([{"content": "only this"}])
    status, found, _ = bench(capsys, "--url", fake.url, "--mix", "30/3", "--requests", 1, "--rounds", 1)
    assert status == 0 and found["server answers have the length that was asked for"] is False
    assert found["concurrency 1 server answer, mean"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "url is missing"),
        (("--url", "ftp://x"), "http://127.0.0.1:8000"),
        (("--url", "http://x", "--against", "a,b"), "one second server"),
        (("--url", "http://x", "--rate", "0"), "rate=0"),
        (("--url", "http://x", "--rate", "nan"), "rate=nan"),
        (("--url", "http://x", "--mix", "x"), "mix='x'"),
        (("--url", "http://x", "--requests", "0"), "requests=0"),
        (("--url", "http://x", "--depth", "3"), "--depth means nothing"),
    ],
)
def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    status, found, _ = bench(capsys, *words)
    assert status == 2 and message in found["error"]


def test_a_server_that_does_not_answer_or_is_too_short_is_told(
    fakes: Callable[[], Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = bench(capsys, "--url", "http://127.0.0.1:9")
    assert status == 1 and "127.0.0.1:9" in found["error"] and "is it there?" in found["error"]
    fake = fakes()
    status, found, _ = bench(capsys, "--url", fake.url, "--mix", "4000/97")
    assert status == 2 and "4097 tokens of context" in found["error"] and "4096" in found["error"]
    fake.key = "secret"
    status, found, _ = bench(capsys, "--url", fake.url, "--mix", "9/9")
    assert status == 1 and "401" in found["error"]


def test_levels_are_named_by_what_is_held(fakes: Callable[[], Fake]) -> None:
    assert Level(rate=0.5).name == "rate 0.5/s" and Level(askers=8).name == "concurrency 8"
