"""Sessions of a server: kept, used by one request at a time, the same to the bit after a restart, whole if killed."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plait.engine.engine import Engine
from plait.engine.request import Request, Sampling
from plait.engine.session import Session
from plait.serve.error import RequestError
from plait.serve.sessions import SessionLimits, Sessions
from plait.text.chat import encode_chat

MakeEngine = Callable[..., Engine]


def turn(sessions: Sessions, engine: Engine, session_id: str, text: str) -> tuple[list[int], int]:
    """One question and its answer; returns new ids, and how many of the prompt were not read again."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    session = sessions.begin(session_id)
    messages = [*session.messages, {"role": "user", "content": text}]
    ids = session.continued(encode_chat(tokenizer, messages), tokenizer)
    # whole words only: bytes of a random model are no text, and a text read again would be another
    bias = {i: -100.0 for i in (*range(290), *range(tokenizer.vocab_size, engine.model.config.vocab_size))}
    sampling = Sampling(max_tokens=9, temperature=0.8, seed=3, logit_bias=tuple(bias.items()))
    request = Request(prompt_ids=tuple(ids), sampling=sampling, session=session, keeps_session=True)
    handle = engine.submit(request)
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    said = "".join(delta.text for delta in deltas)
    asyncio.run(sessions.end(session_id, handle.session, [*messages, {"role": "assistant", "content": said}]))
    return [token for delta in deltas for token in delta.token_ids], deltas[-1].usage.cached_tokens


def status_of(work: Callable[[], object]) -> int:
    with pytest.raises(RequestError) as raised:
        work()
    return raised.value.status


def test_sessions_are_begun_listed_described_and_forgotten(tiny_engine: MakeEngine, tmp_path: Path) -> None:
    engine = tiny_engine()
    sessions = Sessions(tmp_path / "new" / "folder", engine)
    first = sessions.create([{"role": "system", "content": "Sei süß."}])
    second = sessions.create()
    assert first["messages"] == [{"role": "system", "content": "Sei süß."}] and second["messages"] == []
    assert {facts["id"] for facts in sessions.listed()} == {first["id"], second["id"]}
    turn(sessions, engine, str(first["id"]), "the fox")
    found = sessions.describe(str(first["id"]))
    assert found["tokens"] and found["cache"]["state_bytes"] > found["cache"]["kv_bytes"] > 0  # type: ignore[index]
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant"]  # type: ignore[union-attr]
    assert sessions.listed()[0]["id"] == first["id"], "the last used comes first"
    sessions.delete(str(first["id"]))
    assert [facts["id"] for facts in sessions.listed()] == [second["id"]]
    assert status_of(lambda: sessions.describe(str(first["id"]))) == 404
    assert status_of(lambda: sessions.delete(str(first["id"]))) == 404
    # the second was never used, so it has no lock
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"{second['id']}.session"]


@pytest.mark.parametrize("name", ["", "sess_", "../x", "sess_" + "0" * 32, "sess_" + "g" * 32, "x" * 5000, "sess_\n"])
def test_what_is_no_session_is_not_found(tiny_engine: MakeEngine, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.session").write_bytes(b"not yours")
    sessions = Sessions(tmp_path / "kept", tiny_engine())
    for work in (sessions.describe, sessions.begin, sessions.delete):
        assert status_of(lambda work=work: work(name)) == 404
    assert (tmp_path / "x.session").exists() and not list((tmp_path / "kept").iterdir())


def test_a_restart_changes_no_bit(tiny_engine: MakeEngine, tmp_path: Path) -> None:
    engine = tiny_engine()
    sessions = Sessions(tmp_path, engine)
    kept, restarted = str(sessions.create()["id"]), str(sessions.create()["id"])
    answers = [turn(sessions, engine, kept, text) for text in ("the fox", "and the dog", "über")]
    for i, text in enumerate(("the fox", "and the dog", "über")):
        # a new process would build all of this anew
        engine = tiny_engine()
        sessions = Sessions(tmp_path, engine)
        assert turn(sessions, engine, restarted, text) == answers[i]
    assert answers[0][1] == 0 and answers[2][1] > answers[1][1] > 0, "later turns read only what is new"
    one, other = (Session.load(tmp_path / f"{name}.session", engine.model) for name in (kept, restarted))
    assert one.ids == other.ids and one.messages == other.messages
    assert one.cache is not None and other.cache is not None
    theirs = other.cache.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.cache.tensors().items())


def test_a_session_answers_one_request_at_a_time_in_all_processes(tiny_engine: MakeEngine, tmp_path: Path) -> None:
    engine = tiny_engine()
    sessions, others = Sessions(tmp_path, engine), Sessions(tmp_path, engine)
    name = str(sessions.create()["id"])
    sessions.begin(name)
    for store in (sessions, others):
        assert status_of(lambda store=store: store.begin(name)) == 409
        assert status_of(lambda store=store: store.delete(name)) == 409
        assert store.describe(name)["id"] == name, "it can be looked at meanwhile"
    sessions.leave(name)
    sessions.leave(name)
    others.begin(name)
    assert status_of(lambda: sessions.begin(name)) == 409
    others.leave(name)
    sessions.delete(name)
    assert status_of(lambda: others.begin(name)) == 404


def test_without_locks_of_the_system_a_process_still_minds_itself(
    tiny_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.serve.sessions.fcntl", None)
    sessions = Sessions(tmp_path, tiny_engine())
    name = str(sessions.create()["id"])
    sessions.begin(name)
    assert status_of(lambda: sessions.begin(name)) == 409
    sessions.leave(name)
    sessions.begin(name)


def test_a_turn_that_is_left_leaves_the_file_as_it_was(tiny_engine: MakeEngine, tmp_path: Path) -> None:
    engine = tiny_engine()
    sessions = Sessions(tmp_path, engine)
    name = str(sessions.create()["id"])
    turn(sessions, engine, name, "the fox")
    before = (tmp_path / f"{name}.session").read_bytes()
    session = sessions.begin(name)
    session.messages.append({"role": "user", "content": "lost"})
    request = Request(prompt_ids=(*session.ids, 5), sampling=Sampling(max_tokens=50), session=session)
    handle = engine.submit(request)
    engine.step()
    engine.cancel(handle)
    while engine.has_work():
        engine.step()
    sessions.leave(name)
    assert (tmp_path / f"{name}.session").read_bytes() == before
    assert turn(sessions, engine, name, "again")[1] > 0


def test_who_leaves_while_the_disk_is_busy_does_not_give_it_back(
    tiny_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(tmp_path, tiny_engine())
    name = str(sessions.create()["id"])
    whole = Session.save

    def slow(session: Session, *args) -> int:
        sessions.leave(name)
        assert status_of(lambda: sessions.begin(name)) == 409
        return whole(session, *args)

    session = sessions.begin(name)
    monkeypatch.setattr(Session, "save", slow)
    sessions.save(name, session, [{"role": "user", "content": "kept"}])
    assert sessions.begin(name).messages == [{"role": "user", "content": "kept"}]


def test_another_model_or_a_damaged_file_is_told_without_its_place(tiny_engine: MakeEngine, tmp_path: Path) -> None:
    engine = tiny_engine()
    sessions = Sessions(tmp_path, engine)
    name = str(sessions.create()["id"])
    turn(sessions, engine, name, "the fox")
    other = tiny_engine()
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(RequestError, match=f"session {name} belongs to a model .* with other weights") as raised:
        Sessions(tmp_path, other).begin(name)
    assert raised.value.status == 409 and str(tmp_path) not in raised.value.message
    path = tmp_path / f"{name}.session"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"{" * 100):
        path.write_bytes(damaged)
        with pytest.raises(RequestError) as raised:
            sessions.begin(name)
        assert raised.value.status == 409 and str(tmp_path) not in raised.value.message
    path.write_bytes(whole)
    assert turn(sessions, engine, name, "and now")[1] > 0, "a failure gives the session back"


def test_limits_hold(tiny_engine: MakeEngine, tmp_path: Path) -> None:
    engine = tiny_engine()
    sessions = Sessions(tmp_path, engine, SessionLimits(count=2))
    name = str(sessions.create()["id"])
    sessions.create()
    assert status_of(sessions.create) == 429
    turn(sessions, engine, name, "the fox")
    full = Sessions(tmp_path, engine, SessionLimits(total_bytes=(tmp_path / f"{name}.session").stat().st_size))
    assert status_of(full.create) == 429 and status_of(lambda: full.begin(name)) == 429
    full.delete(name)
    full.create()
    with pytest.raises(ValueError, match="count=0: must be at least 1"):
        SessionLimits(count=0)


KILLED = """
import sys, torch
from pathlib import Path
from plait.engine.session import Session
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.serve.sessions import Sessions
from types import SimpleNamespace

torch.set_num_threads(1)
config = ModelConfig.from_pattern("M", vocab_size=8, d_model=16, mamba2={"n_heads": 64, "head_dim": 64, "d_state": 128})
model = build(config, recipe="fp32", seed=0)
sessions = Sessions(Path(sys.argv[1]), SimpleNamespace(model=model))
name = sessions.create()["id"]
while True:
    session = sessions.begin(name)
    cache = model.cache(1)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
    session.ids, session.cache = [1, 2, 3], cache
    sessions.save(name, session, [*session.messages, {"role": "user", "content": "x"}])
    print(len(session.messages), flush=True)
"""


def test_a_killed_server_leaves_whole_sessions_and_nothing_else(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from plait.model.config import ModelConfig
    from plait.model.hybrid import build

    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        saved = int(process.stdout.readline())
    # in the middle of whatever it does now
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / f".sess_{'0' * 32}.session.{process.pid}").write_bytes(b"half")
    sizes = {"n_heads": 64, "head_dim": 64, "d_state": 128}
    model = build(ModelConfig.from_pattern("M", vocab_size=8, d_model=16, mamba2=sizes), recipe="fp32", seed=0)
    sessions = Sessions(tmp_path, SimpleNamespace(model=model))  # type: ignore[arg-type]
    (facts,) = sessions.listed()
    # what was said to be saved is there, and the lock of the dead is gone with it
    assert len(sessions.begin(str(facts["id"])).messages) >= saved >= 20
    sessions.leave(str(facts["id"]))
    assert {path.suffix for path in tmp_path.iterdir()} == {".session", ".lock"}


def test_a_session_whose_reader_leaves_before_it_is_written_is_nobody_elses(
    tmp_path: Path, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(tmp_path, tiny_engine())
    session_id = str(sessions.create()["id"])
    session, save, go = sessions.begin(session_id), sessions.save, threading.Event()
    monkeypatch.setattr(sessions, "save", lambda *args: (go.wait(10), save(*args)))

    async def run() -> None:
        ending = asyncio.create_task(sessions.end(session_id, session, [{"role": "user", "content": "the fox"}]))
        await asyncio.sleep(0.05)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        sessions.leave(session_id)
        assert status_of(lambda: sessions.begin(session_id)) == 409
        go.set()

    asyncio.run(run())
    assert sessions.begin(session_id).messages == [{"role": "user", "content": "the fox"}]
