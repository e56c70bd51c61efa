"""Several replicas behind one address: who is asked, and what happens when one dies."""

import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from plait.serve import frame
from plait.serve.affinity import Memory, prefixes
from plait.serve.fleet import Fleet
from plait.serve.frame import Frame
from plait.serve.keys import Keys
from plait.serve.limits import Limits
from plait.serve.relay import Relay, numbered
from plait.serve.server import Server, address_of, bind

# a replica without a model: it says its number and process, slowly if asked to
REPLICA = textwrap.dedent("""
    import asyncio, os, sys
    import uvicorn

    async def app(scope, receive, send):
        path = scope["path"]
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        kind = b"text/event-stream" if b"slow" in body else b"application/json"
        status = 429 if b"full" in body and NUMBER == "0" else 200
        head = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": head})
        n = 100 if b"slow" in body else 1
        for i in range(n):
            text = f"data: {NUMBER} {os.getpid()}\\n\\n" if n > 1 else f'["{NUMBER}", {os.getpid()}]'
            if b"huge" in body:
                text = "data: " + "x" * (1 << 20) + "\\n\\n"
            if path == "/metrics":
                text = f"# HELP a x\\n# TYPE a gauge\\na {NUMBER}\\na_b{{c=\\"d\\"}} 2\\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": i < n - 1})
            if n > 1:
                await asyncio.sleep(0.05)

    NUMBER = sys.argv[1]
    uvicorn.run(app, uds=sys.argv[2], log_level="error", lifespan="off")
""")


def test_a_conversation_goes_where_it_was() -> None:
    memory = Memory()
    idle = {0: 0, 1: 0, 2: 0}
    turns = ['{"role":"user","content":"a"}', '{"role":"assistant","content":"b"}', '{"role":"user","content":"c"}']
    first = prefixes(f'{{"messages":[{turns[0]}]}}'.encode())
    later = prefixes(f'{{"n":1,"messages":[{",".join(turns)}]}}'.encode())
    assert later[0] == first[0] and len(later) == 3
    chosen = memory.choose(first, {0: 5, 1: 2, 2: 7})
    assert chosen == 1 and memory.choose(later, idle) == 1
    # others go to the least busy, and a replica that is much busier is spared
    assert memory.choose(prefixes(b'{"prompt":"x"}'), {0: 0, 1: 1, 2: 1}) == 0
    assert memory.choose(later, {0: 0, 1: 4, 2: 1}) == 1
    assert memory.choose(later, {0: 0, 1: 5, 2: 1}) == 0
    memory.forget(0)
    assert memory.choose(later, {1: 1, 2: 0}) == 2


def test_prompts_share_beginnings_in_pieces() -> None:
    long = "x" * 5000
    one, other = prefixes(f'{{"prompt":"{long}a"}}'.encode()), prefixes(f'{{"prompt":"{long}b"}}'.encode())
    assert len(one) == 3 and one[:2] == other[:2] and one[2] != other[2]
    assert len(prefixes(b'{"prompt":[' + b"1," * 1023 + b"1]}")) == 2
    assert prefixes(b'{"session":"s","messages":[{}]}') == prefixes(b'{"session":"s"}')
    for nothing in (b"", b"{", b"[]", b'{"prompt":5}', b'{"prompt":NaN}', b"[" * 100_000):
        assert prefixes(nothing) == []


def test_figures_of_all_are_joined() -> None:
    text = b'# HELP a x\n# TYPE a gauge\na 1.0\n# HELP b y\n# TYPE b counter\nb{c="d"} 2.0\n'
    joined = numbered({0: text, 1: text}, b"").decode()
    assert joined.count("# TYPE a gauge") == 1
    assert 'a{replica="0"} 1.0\na{replica="1"} 1.0\n' in joined and 'b{replica="1",c="d"} 2.0' in joined


class Front:
    """A fleet of fakes in a thread."""

    def __init__(self, script: Path, keys: Keys | None = None, n: int = 2) -> None:
        self.fleet = Fleet(lambda i, socket: [sys.executable, str(script), str(i), str(socket)], n, 1)
        relay = Relay(self.fleet, Limits(), keys or Keys())
        sock = bind("127.0.0.1", 0)
        self.url = address_of(sock)
        self.server = Server(relay, Frame(relay, relay), sock, 5)
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.errors.append(error)

    def until(self, true: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end and not self.errors
            time.sleep(0.02)

    def all_ready(self) -> bool:
        return all(replica.is_ready for replica in self.fleet.replicas)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    script = tmp_path_factory.mktemp("fleet") / "replica.py"
    script.write_text(REPLICA)
    found = Front(script)
    found.until(found.all_ready)
    yield found
    found.server.stop()
    found.thread.join(20)
    assert not found.thread.is_alive() and not found.fleet.replicas[0].socket.parent.exists()


def test_both_are_used_and_the_same_beginning_goes_to_the_same(front: Front) -> None:
    def ask(text: str) -> str:
        return httpx.post(f"{front.url}/v1/completions", json={"prompt": text}).json()[0]

    with httpx.stream("POST", f"{front.url}/v1/completions", json={"prompt": "slow one"}) as slow:
        lines = slow.iter_lines()
        busy = next(lines).split()[1]
        assert {ask(f"question {i}") for i in range(4)} == {"1" if busy == "0" else "0"}
    front.until(lambda: not any(replica.open for replica in front.fleet.replicas))
    assert len({ask("once more") for _ in range(5)}) == 1


def test_who_is_full_is_passed_over(front: Front) -> None:
    assert httpx.post(f"{front.url}/v1/completions", json={"prompt": "full"}).json()[0] == "1"


def test_ready_and_metrics_tell_of_all(front: Front) -> None:
    front.until(front.all_ready)
    assert httpx.get(f"{front.url}/ready").json() == {"status": "ready", "replicas": [True, True]}
    text = httpx.get(f"{front.url}/metrics").text
    assert 'a{replica="0"} 0' in text and 'a_b{replica="1",c="d"} 2' in text
    assert 'plait_requests_total{replica="front"' in text


def test_a_dead_replica_is_replaced_and_nobody_else_notices(front: Front) -> None:
    front.until(front.all_ready)
    with httpx.stream("POST", f"{front.url}/v1/completions", json={"prompt": "slow"}) as slow:
        lines = slow.iter_lines()
        victim = int(next(lines).split()[2])
        os.kill(victim, signal.SIGKILL)
        rest = list(lines)
        # this client is told; the answer does not simply end
        assert "not complete" in rest[-2] or "not complete" in rest[-1]
    for i in range(20):
        assert httpx.post(f"{front.url}/v1/completions", json={"prompt": f"{i}"}).status_code == 200
    front.until(front.all_ready)
    assert sum(replica.restarts for replica in front.fleet.replicas) == 1


def test_a_client_that_leaves_is_noticed_by_the_replica(front: Front) -> None:
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(5, read=0.01)) as client:
        client.post(f"{front.url}/v1/completions", json={"prompt": "slow"})
    front.until(lambda: not any(replica.open for replica in front.fleet.replicas), 4)


def test_who_reads_nothing_of_a_long_answer_is_given_up(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "_PATIENCE_S", 0.3)
    host, port = front.url.removeprefix("http://").split(":")
    body = b'{"prompt": "slow huge"}'
    with socket.create_connection((host, int(port))) as reader:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        reader.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        front.until(lambda: any(replica.open for replica in front.fleet.replicas))
        front.until(lambda: not any(replica.open for replica in front.fleet.replicas), 10)


def test_a_replica_that_cannot_begin_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "replica.py"
    script.write_text("import sys; sys.exit(2)")
    front = Front(script)
    front.thread.join(30)
    assert "replica" in str(front.errors[0]) and "status 2" in str(front.errors[0])


def test_keys_are_asked_for_in_front(front: Front, tmp_path: Path) -> None:
    script = tmp_path / "replica.py"
    script.write_text(REPLICA)
    guarded = Front(script, Keys(["k"]), n=1)
    guarded.until(guarded.all_ready)
    ask = {"prompt": "a"}
    assert httpx.post(f"{guarded.url}/v1/completions", json=ask).status_code == 401
    header = {"authorization": "Bearer k"}
    assert httpx.post(f"{guarded.url}/v1/completions", json=ask, headers=header).status_code == 200
    guarded.server.stop()
    guarded.thread.join(20)
    assert not guarded.thread.is_alive() and not guarded.errors
