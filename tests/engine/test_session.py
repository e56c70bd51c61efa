"""Sessions: saved and loaded, a conversation goes on bit for bit; another model's, or a broken file, is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.engine.session import Session
from plait.model.hybrid import Hybrid, build

Tiny = Callable[..., Hybrid]
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
TURN = [7, 8, 9]


def spoken(model: Hybrid, sampling: Sampling = GREEDY) -> tuple[Session, list[int]]:
    """A session after one answer to a prompt of 40 tokens, and all ids so far."""
    session = Session([{"role": "user", "content": "süß 🐻"}])
    stream = Engine(model, prefill_chunk=16).stream([i * 5 % 384 for i in range(40)], sampling, session)
    list(stream)
    return session, stream.completion.prompt_ids + stream.completion.token_ids


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_tokens=12, temperature=0.9, seed=4)], ids=["greedy", "seed"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", ["M-M*-M", "*-*-", "MM"])
def test_a_loaded_session_goes_on_bit_for_bit(
    tiny: Tiny, tmp_path: Path, pattern: str, recipe: str, sampling: Sampling
) -> None:
    model = build(tiny(pattern).config, recipe=recipe)
    session, ids = spoken(model, sampling)
    n_bytes = session.save(tmp_path / "talk.session", model)
    assert n_bytes == (tmp_path / "talk.session").stat().st_size
    loaded = Session.load(tmp_path / "talk.session", model)
    assert loaded.messages == session.messages and loaded.ids == session.ids
    logits = []
    for each in (session, loaded):
        assert each.cache is not None
        with torch.inference_mode():
            # a copy, as the cache moves on
            copy = model.cache(1)
            copy.replace({name: t.clone() for name, t in each.cache.tensors().items()}, each.cache.n_tokens)
            logits.append(model(torch.tensor([ids[-1:] + TURN]), cache=copy).logits)
    assert torch.equal(*logits)
    answers = []
    for each in (session, loaded):
        stream = Engine(model).stream(ids + TURN, sampling, each)
        list(stream)
        assert stream.completion.usage.cached_tokens == len(ids) - 1
        answers.append(stream.completion.token_ids)
    assert answers[0] == answers[1]


def test_going_on_equals_reading_everything_anew(tiny: Tiny) -> None:
    model = tiny()
    session, ids = spoken(model)
    stream = Engine(model).stream(ids + TURN, GREEDY, session)
    list(stream)
    assert stream.completion.token_ids == next(Engine(model).generate(ids + TURN, GREEDY)).token_ids


def test_a_seeded_answer_in_two_parts_equals_one_in_one_go(tiny: Tiny) -> None:
    model = tiny()
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    whole = next(Engine(model).generate([3, 4, 5], sampling)).token_ids
    session = Session()
    first = Engine(model).stream([3, 4, 5], replace(sampling, max_tokens=8), session)
    list(first)
    second = Engine(model).stream([3, 4, 5, *whole[:8]], replace(sampling, max_tokens=12), session)
    list(second)
    assert first.completion.token_ids + second.completion.token_ids == whole
    assert len(set(whole)) > 8


def test_a_prompt_that_leaves_the_path_is_read_from_its_beginning(tiny: Tiny) -> None:
    model = tiny()
    for change in (lambda ids: [1, *ids[1:]], lambda ids: ids[:20], lambda ids: ids[:-1]):
        session, ids = spoken(model)
        other = change(ids)
        stream = Engine(model).stream(other, GREEDY, session)
        list(stream)
        assert stream.completion.usage.cached_tokens == 0
        assert stream.completion.token_ids == next(Engine(model).generate(other, GREEDY)).token_ids
        assert session.ids == other + stream.completion.token_ids[:-1]


def test_size_tells_constant_state_from_growing_keys_and_values(tiny: Tiny) -> None:
    model = tiny("M-M*-M")
    session, _ = spoken(model)
    n_tokens = 40 + 11
    # per Mamba-2 layer: 4 x 16 x 16 of state and 128 x 4 of window; attention: 2 x 2 x 8 per token; 4 bytes each
    assert session.size().state_bytes == 3 * (4 * 16 * 16 + 128 * 4) * 4
    assert session.size().kv_bytes == n_tokens * 2 * 2 * 8 * 4
    assert session.size().n_bytes == session.size().state_bytes + session.size().kv_bytes
    assert Session().size().n_bytes == 0


def test_the_file_is_little_more_than_the_cache(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("M-M*-M")
    session, _ = spoken(model)
    assert session.save(tmp_path / "a", model) < session.size().n_bytes + 4096


def test_a_session_without_a_cache_keeps_its_messages(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    Session([{"role": "user", "content": "hi"}]).save(tmp_path / "a", model)
    loaded = Session.load(tmp_path / "a", model)
    assert loaded.messages[0]["content"] == "hi" and loaded.cache is None and loaded.ids == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tiny: tiny("M-M*-", name="other"), "belongs to the model 'first', this is 'other' of other sizes"),
        (lambda tiny: tiny(seed=1, name="first"), "'first' with other weights"),
        (lambda tiny: build(tiny(name="first").config, recipe="bf16"), "'fp32 in float32', this model runs in 'bf16"),
    ],
    ids=["sizes", "weights", "precision"],
)
def test_another_models_file_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, make: Callable[[Tiny], Hybrid], message: str
) -> None:
    model = tiny(name="first")
    session, _ = spoken(model)
    session.save(tmp_path / "talk", model)
    with pytest.raises(ValueError, match=message):
        Session.load(tmp_path / "talk", make(tiny))
    assert Session.load(tmp_path / "talk", tiny(name="first")).ids == session.ids


def test_a_broken_file_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    session, _ = spoken(model)
    path = tmp_path / "talk"
    session.save(path, model)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:5], b"", b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{path} is not a session"):
            Session.load(path, model)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        Session.load(tmp_path / "absent", model)


def test_other_safetensors_are_no_session(tiny: Tiny, tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a session of plait"):
        Session.load(tmp_path / "weights", tiny())


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_failed_save_leaves_the_old_file(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model = tiny()
    session, _ = spoken(model)
    session.save(tmp_path / "talk", model)
    before = (tmp_path / "talk").read_bytes()
    session.messages.append({"role": "user", "content": "more"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "write":
        monkeypatch.setattr("os.fsync", full)
    else:
        monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        session.save(tmp_path / "talk", model)
    assert (tmp_path / "talk").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["talk"]


def test_settings_of_the_answer_do_not_touch_the_session(tiny: Tiny) -> None:
    model = tiny()
    session, ids = spoken(model, replace(GREEDY, max_tokens=1))
    # one token was drawn and none fed: the cache has seen the prompt only
    assert session.ids == ids[:-1] and len(session.ids) == 40


def test_a_flipped_bit_anywhere_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("M*")
    session, _ = spoken(model)
    path = tmp_path / "talk"
    session.save(path, model)
    whole = path.read_bytes()
    header = range(0, 8 + int.from_bytes(whole[:8], "little"), 23)
    for at in (*header, *range(header.stop, len(whole), 997), len(whole) - 1):
        broken = bytearray(whole)
        broken[at] ^= 4
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=str(path)):
            Session.load(path, model)


@pytest.mark.parametrize("end", ["ssm", "conv", "k", "lengths"])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_cache_of_other_sizes_is_refused_by_name(tiny: Tiny, end: str, axis: int) -> None:
    model = tiny("M*")
    session, _ = spoken(model)
    assert session.cache is not None
    tensors = session.cache.tensors()
    name = next(name for name in tensors if name.endswith(end))
    axis = min(axis, tensors[name].dim() - 1)
    tensors[name] = torch.cat([tensors[name]] * 2, axis)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        model.cache(1).replace(tensors, session.cache.n_tokens)


def test_a_failed_write_names_the_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    model = tiny()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        Session().save(tmp_path / "talk", model)
    assert caught.value.filename == str(tmp_path / "talk")
    assert not list(tmp_path.iterdir())
