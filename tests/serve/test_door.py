"""Places, leaving clients, draining, failing engines: what happens around an answer."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NoReturn

import httpx
import pytest

from plait.engine.request import FinishReason, Request
from plait.engine.sequence import Delta, Handle
from plait.engine.worker import WorkerError
from plait.serve import door, frame
from plait.serve.keys import Keys
from plait.serve.limits import Limits
from plait.serve.served import House

ASK = {"prompt": "the", "max_tokens": 400}


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_at_once(fake, stream: bool) -> None:
    # one token in a minute: the cancellation cannot wait for a token
    running, worker = fake(pause_s=60)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/completions", json=ASK | {"stream": stream}, timeout=0.3)
    until(lambda: worker.cancelled and not worker.open)
    until(lambda: running.house.gate.open == 0)


def test_a_client_that_leaves_within_a_stream_is_cancelled(fake) -> None:
    running, worker = fake(pause_s=0.01)
    with httpx.stream("POST", f"{running.url}/v1/completions", json=ASK | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert worker.open
    until(lambda: worker.cancelled and not worker.open)
    until(lambda: running.house.gate.open == 0)


def test_who_comes_when_all_is_full_is_told_to_come_again(fake) -> None:
    running, worker = fake(pause_s=0.02, limits=Limits(context=512, open=2))
    url = f"{running.url}/v1/completions"
    threads = [threading.Thread(target=httpx.post, args=(url,), kwargs={"json": ASK | {"max_tokens": 40}})]
    threads.append(threading.Thread(target=httpx.post, args=(url,), kwargs={"json": ASK | {"max_tokens": 40}}))
    for thread in threads:
        thread.start()
    until(lambda: len(worker.open) == 2)
    refused = httpx.post(url, json=ASK)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert httpx.post(url, json=ASK | {"max_tokens": 1}).status_code == 200
    # three answers need three places
    assert httpx.post(url, json=ASK | {"n": 3}).status_code == 429
    until(lambda: running.house.gate.open == 0)
    # counted when the answer is out
    until(lambda: running.house.metrics.value("plait_requests_refused_total") == 2)
    assert "plait_requests_refused_total 2.0" in httpx.get(f"{running.url}/metrics").text


def test_many_answers_at_once_all_come(fake) -> None:
    running, _ = fake(pause_s=0.001)
    texts = []

    def ask() -> None:
        with httpx.stream("POST", f"{running.url}/v1/completions", json=ASK | {"stream": True, "max_tokens": 20}) as it:
            lines = [json.loads(line[6:]) for line in it.iter_lines() if line.startswith("data: {")]
            texts.append("".join(line["choices"][0]["text"] for line in lines))

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["ab " * 20] * 32


def test_draining_ends_what_was_begun_and_takes_nothing_new(fake) -> None:
    running, worker = fake(pause_s=0.02)
    ended = []
    thread = threading.Thread(
        target=lambda: ended.append(httpx.post(f"{running.url}/v1/completions", json=ASK | {"max_tokens": 40}))
    )
    thread.start()
    until(lambda: bool(worker.open))
    running.server.stop()
    until(lambda: running.house.phase == "draining")
    ready = httpx.get(f"{running.url}/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert httpx.get(f"{running.url}/health").status_code == 200
    refused = httpx.post(f"{running.url}/v1/completions", json=ASK)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    thread.join()
    assert ended[0].status_code == 200 and ended[0].json()["choices"][0]["text"] == "ab " * 40
    running.thread.join(30)
    assert not running.thread.is_alive() and not running.errors


def test_what_outlasts_the_drain_is_told_that_it_is_not_complete(fake) -> None:
    running, worker = fake(pause_s=0.05, drain_s=0.2)
    with httpx.stream("POST", f"{running.url}/v1/completions", json=ASK | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.server.stop()
        last = [line for line in lines if line.startswith("data:")][-1]
    assert json.loads(last[6:])["error"]["type"] == "service_unavailable_error"
    running.thread.join(30)
    assert not running.thread.is_alive()


def test_loading_is_told_and_a_failure_to_load_ends_the_server(tokenizer) -> None:
    from tests.serve.conftest import run_server

    go = threading.Event()

    def load():
        go.wait(10)
        raise ValueError("there is no such checkpoint")

    running = run_server(load)
    ready = httpx.get(f"{running.url}/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
    assert httpx.get(f"{running.url}/health").status_code == 200
    refused = httpx.post(f"{running.url}/v1/completions", json=ASK)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
    go.set()
    running.thread.join(30)
    assert [str(error) for error in running.errors] == ["there is no such checkpoint"]


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (WorkerError("the engine has failed: a secret path"), 503, "service_unavailable_error"),
        (ValueError("prompt_ids: the cache cannot hold 9 tokens"), 400, "invalid_request_error"),
        (KeyError("a secret path"), 500, "server_error"),
    ],
)
def test_a_fault_of_the_engine_becomes_an_error(fake, monkeypatch, fault, status: int, kind: str) -> None:
    running, worker = fake()

    async def stream(request: Request):
        raise fault
        yield

    monkeypatch.setattr(worker, "stream", stream)
    for body in (ASK, ASK | {"stream": True}, ASK | {"prompt": ["a", "b"]}):
        answer = httpx.post(f"{running.url}/v1/completions", json=body)
        assert answer.status_code == status and answer.json()["error"]["type"] == kind
        assert "secret" not in answer.text
    until(lambda: running.house.gate.open == 0)


@pytest.mark.parametrize(
    ("reason", "status"), [(FinishReason.TIMEOUT, 504), (FinishReason.ERROR, 500), (FinishReason.CANCELLED, 503)]
)
def test_an_answer_that_fails_on_its_way_is_no_answer(fake, monkeypatch, reason, status: int) -> None:
    running, worker = fake()

    async def stream(request: Request):
        handle = Handle(request, "", 0.0)
        yield Delta(handle=handle, text="so far", token_ids=(5,))
        yield Delta(handle=handle, finish_reason=reason, error="why")

    monkeypatch.setattr(worker, "stream", stream)
    assert httpx.post(f"{running.url}/v1/completions", json=ASK).status_code == status
    streamed = httpx.post(f"{running.url}/v1/completions", json=ASK | {"stream": True})
    lines = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert streamed.status_code == 200 and lines[0]["choices"][0]["text"] == "so far" and "error" in lines[-1]
    assert "[DONE]" not in streamed.text


def test_requests_have_ids_and_the_log_has_no_prompts(fake, caplog) -> None:
    running, worker = fake()
    with caplog.at_level("INFO", "plait.serve"):
        named = httpx.post(
            f"{running.url}/v1/completions", json=ASK | {"prompt": "a secret"}, headers={"x-request-id": "q7"}
        )
        other = httpx.post(f"{running.url}/v1/completions", json=ASK, headers={"x-request-id": "a b\u00e4".encode()})
    assert named.headers["x-request-id"] == "q7" == worker.requests[0].request_id
    assert other.headers["x-request-id"] not in ("", "a b")
    # a request is noted after the last byte of its answer, which its client may have read by then
    until(lambda: sum(record.name == "plait.serve" for record in caplog.records) == 2)
    notes = [json.loads(record.message) for record in caplog.records if record.name == "plait.serve"]
    assert [note["status"] for note in notes] == [200, 200] and notes[0]["id"] == "q7" and notes[0]["tokens"] == 400
    assert "secret" not in caplog.text


def test_pages_of_other_origins_and_other_hosts_are_kept_out(fake) -> None:
    running, _ = fake(hosts=["127.0.0.1"])
    url = f"{running.url}/v1/models"
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(url, headers=preflight).headers
    plain = httpx.post(f"{running.url}/v1/completions", content=json.dumps(ASK), headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    opened, _ = fake(origins=["https://ours.example"])
    ours = preflight | {"origin": "https://ours.example"}
    answer = httpx.options(f"{opened.url}/v1/models", headers=ours)
    assert answer.headers["access-control-allow-origin"] == "https://ours.example"
    assert "access-control-allow-origin" not in httpx.options(f"{opened.url}/v1/models", headers=preflight).headers


def test_a_reader_who_takes_all_but_the_end_of_a_stream_is_gone_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frame, "_PATIENCE_S", 0.05)
    sent = []

    async def app(scope, receive, send) -> None:
        await door._send_stream(send, events(), named=False)

    async def send(message) -> None:
        if not message.get("more_body", True):
            # the buffers of the connection are full
            await asyncio.sleep(60)
        sent.append(message)

    async def events():
        yield {"text": "a"}

    async def receive() -> NoReturn:
        raise AssertionError("nothing is read")

    async def run() -> None:
        async with asyncio.timeout(5):
            scope = {"type": "http", "path": "/", "headers": []}
            await frame.Frame(app, House(Limits(), Keys()))(scope, receive, send)

    with caplog.at_level("INFO", "plait.serve"):
        asyncio.run(run())
    assert sent[-1]["body"] == b"data: [DONE]\n\n"
    assert json.loads(caplog.messages[-1])["reason"] == "disconnected"


def test_refusals_are_counted_wherever_they_are_given(fake) -> None:
    running, _ = fake()
    with ExitStack() as full:
        for _ in range(running.house.desk.most):
            full.enter_context(running.house.desk.enter())
        assert httpx.post(f"{running.url}/tokenize", json={"prompt": "a"}).status_code == 429
    assert httpx.post(f"{running.url}/tokenize", json={"prompt": "a"}).status_code == 200
    until(lambda: running.house.metrics.value("plait_requests_refused_total") == 1)
