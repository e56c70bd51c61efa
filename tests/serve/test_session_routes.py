"""Sessions over HTTP: begun, gone on with across restarts, left alone by what fails, and refused in OpenAI's words."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest
from tests.serve.conftest import CONTEXT, WORDS, Running, run_server, wait_until

from plait.engine.engine import Engine
from plait.engine.worker import Worker
from plait.formats.checkpoint import save
from plait.serve.keys import Keys
from plait.serve.served import Served
from plait.serve.sessions import SessionLimits, Sessions
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer

Start = Callable[..., Running]


@pytest.fixture
def start(tiny_engine: Callable[..., Engine], tmp_path: Path) -> Iterator[Start]:
    """Servers over the same folder of sessions, each with an engine of its own; all of them end with the test."""
    started: list[Running] = []

    def make(keeps: bool = True, limits: SessionLimits | None = None, **settings) -> Running:
        engine = tiny_engine()
        sessions = Sessions(tmp_path, engine, limits) if keeps else None
        started.append(run_server(lambda: Served.of(Worker(engine), "tiny", CONTEXT, sessions=sessions), **settings))
        wait_until(lambda: started[-1].house.phase == "ready")
        return started[-1]

    yield make
    for running in started:
        running.stop()


def words_only(tokenizer: Tokenizer) -> dict[str, int]:
    """A bias against bytes: those of a random model are no text, and would be read again as others."""
    return {str(i): -100 for i in (*range(290), *range(tokenizer.vocab_size, 384))}


def say(running: Running, session: str, text: str, tokenizer: Tokenizer, stream: bool = False) -> tuple[str, int]:
    """One turn; returns the answer, and how many tokens of the prompt were not read again."""
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
        "seed": 5,
        "logit_bias": words_only(tokenizer),
        "extra_body": {"session": session},
    }
    if not stream:
        found = running.client.chat.completions.create(**asked)
        return found.choices[0].message.content, found.usage.prompt_tokens_details.cached_tokens
    chunks = running.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *pieces, last = chunks
    return "".join(
        piece.choices[0].delta.content or "" for piece in pieces
    ), last.usage.prompt_tokens_details.cached_tokens


def begun(running: Running, **body: object) -> str:
    answer = httpx.post(f"{running.url}/v1/sessions", json=body)
    assert answer.status_code == 201
    return answer.json()["id"]


def test_a_session_has_its_routes(start: Start, tokenizer: Tokenizer) -> None:
    running = start()
    url = f"{running.url}/v1/sessions"
    opening = [{"role": "system", "content": "Sei süß."}]
    first = begun(running, messages=opening)
    # an empty body will do
    second = httpx.post(url, headers={"content-type": "application/json"}).json()["id"]
    assert say(running, first, "the fox", tokenizer)[0]
    found = httpx.get(f"{url}/{first}").json()
    assert found["object"] == "session" and found["tokens"] > 0 and found["bytes"] > found["cache"]["state_bytes"] > 0
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant"]
    listed = httpx.get(url).json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == [first, second]
    assert "messages" not in listed["data"][0]
    assert httpx.delete(f"{url}/{first}").json() == {"id": first, "object": "session.deleted", "deleted": True}
    assert httpx.get(f"{url}/{first}").status_code == 404
    assert [one["id"] for one in httpx.get(url).json()["data"]] == [second]


def test_a_conversation_goes_on_after_a_restart_word_for_word(start: Start, tokenizer: Tokenizer) -> None:
    texts = ("the fox", "and the dog", "über die Straße")
    one = start()
    straight = begun(one)
    # whole and streamed answers are kept alike
    kept = [say(one, straight, text, tokenizer, stream=i == 1) for i, text in enumerate(texts)]
    restarted = begun(one)
    for i, text in enumerate(texts):
        assert say(start(), restarted, text, tokenizer, stream=i == 2)[0] == kept[i][0]
    two = [httpx.get(f"{one.url}/v1/sessions/{name}").json() for name in (straight, restarted)]
    assert two[0]["messages"] == two[1]["messages"] and len(two[0]["messages"]) == 6
    assert kept[2][1] > kept[1][1] > 0, "only what is new is read"


def test_a_reader_who_leaves_leaves_the_session_as_it_was(
    start: Start, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    session = begun(running)
    say(running, session, "the fox", tokenizer)
    before = httpx.get(f"{running.url}/v1/sessions/{session}").json()
    asked = {
        "messages": [{"role": "user", "content": "go on"}],
        "session": session,
        "max_tokens": 900,
        "ignore_eos": True,
    }
    engine = running.house.served.worker.engine
    step = engine.step
    # the answer must outlast the questions below, on any machine
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=asked | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert any('"content"' in line for line in lines)
        # it is in use now, and says so
        busy = httpx.post(f"{running.url}/v1/chat/completions", json=asked | {"max_tokens": 3})
        assert busy.status_code == 409 and busy.json()["error"]["param"] == "session"
        assert httpx.delete(f"{running.url}/v1/sessions/{session}").status_code == 409
    wait_until(lambda: running.house.served.worker.load().running == 0)

    def is_free() -> bool:
        return httpx.post(f"{running.url}/v1/chat/completions", json=asked | {"max_tokens": 0}).status_code == 400

    wait_until(is_free)
    assert httpx.get(f"{running.url}/v1/sessions/{session}").json() == before
    wait_until(lambda: httpx.delete(f"{running.url}/v1/sessions/{session}").status_code == 200)


def test_a_turn_that_is_refused_gives_the_session_back(start: Start, tokenizer: Tokenizer) -> None:
    running = start()
    session = begun(running)
    url = f"{running.url}/v1/chat/completions"
    for more in ({"n": 2}, {"max_tokens": CONTEXT}, {"logit_bias": {"9999": 1}}, {"messages": []}):
        asked = {"messages": [{"role": "user", "content": "x"}], "session": session, "max_tokens": 3} | more
        assert httpx.post(url, json=asked).status_code == 400, more
    assert say(running, session, "the fox", tokenizer)[0]


def test_sessions_are_refused_in_the_words_of_the_protocol(start: Start) -> None:
    running = start(limits=SessionLimits(count=1))
    url = f"{running.url}/v1/sessions"
    begun(running)

    def status(answer: httpx.Response) -> int:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.status_code

    assert status(httpx.post(url, json={})) == 429
    assert status(httpx.get(f"{url}/sess_{'0' * 32}")) == 404
    assert status(httpx.get(f"{url}/..%2F..%2Fetc%2Fpasswd")) == 404
    assert status(httpx.put(url, json={})) == 405
    for body in (
        {"messages": 3},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"mesages": []},
        [],
        {"model": 1},
    ):
        assert status(httpx.post(url, json=body)) == 400
    assert status(httpx.post(url, content=b"{", headers={"content-type": "application/json"})) == 400
    assert status(httpx.post(url, json={"model": "other"})) == 404
    with pytest.raises(openai.NotFoundError, match="no session"):
        running.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], extra_body={"session": "sess_none"}
        )


def test_a_server_without_a_folder_says_so(start: Start) -> None:
    running = start(keeps=False)
    answer = httpx.get(f"{running.url}/v1/sessions")
    assert answer.status_code == 404 and "--sessions FOLDER" in answer.json()["error"]["message"]


def test_sessions_need_the_key(start: Start) -> None:
    running = start(keys=Keys.open("secret", None))
    assert httpx.get(f"{running.url}/v1/sessions").status_code == 401
    assert httpx.get(f"{running.url}/v1/sessions", headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_killed_server_comes_back_with_its_sessions(
    tiny_engine: Callable[..., Engine], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train_bpe([WORDS], 340).save(tmp_path / "words")
    save(tiny_engine().model, tmp_path / "tiny", tokenizer=tmp_path / "words")
    words = [sys.executable, "-m", "plait", "serve", str(tmp_path / "tiny"), "--port", "0", "--device", "cpu"]

    def serve() -> tuple[subprocess.Popen[str], Running]:
        process = subprocess.Popen(
            [*words, "--sessions", str(tmp_path / "kept")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "ready after" in line:
                url = next(word.rstrip(",") for word in line.split() if word.startswith("http"))
                # nobody reads what it logs from now on, and a full pipe would stop it
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return process, Running(url, None, None, threading.Thread())  # type: ignore[arg-type]
        raise AssertionError("the server did not start")

    process, running = serve()
    try:
        session = begun(running)
        said = say(running, session, "the fox", tokenizer)[0]
        asked = {
            "messages": [{"role": "user", "content": "lost"}],
            "session": session,
            "ignore_eos": True,
            "stream": True,
        }
        with (
            closing(httpx.Client(base_url=running.url)) as client,
            client.stream("POST", "/v1/chat/completions", json=asked) as answer,
        ):
            next(line for line in answer.iter_lines() if '"content"' in line)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process, running = serve()
        found = httpx.get(f"{running.url}/v1/sessions/{session}").json()
        assert [message["content"] for message in found["messages"]] == ["the fox", said]
        assert say(running, session, "and on", tokenizer)[1] > 0
    finally:
        process.kill()
        process.wait()
