"""What the running batch promises: admission, sharing, bits, bytes, order, and ends, one by one."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from plait.engine.core import Core, Limits
from plait.engine.engine import Engine
from plait.engine.request import Request, Sampling
from plait.engine.sequence import Delta, Handle
from plait.engine.session import Session
from plait.model.hybrid import Hybrid
from plait.model.paged import PAGE, PagedKV, SlotState

Tiny = Callable[..., Hybrid]
GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)


def ids(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 384, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def sized(model: Hybrid, slots: int, pages: int, **limits: int) -> Engine:
    one = Engine(model).core.pool
    n_bytes = slots * one.slot_bytes + pages * one.page_bytes
    assert slots * one.slot_bytes <= n_bytes // 2 or not one.page_bytes
    return Engine(model, limits=Limits(cache_bytes=n_bytes, max_running=slots, **limits))


def run(engine: Engine) -> dict[Handle, list[Delta]]:
    deltas: dict[Handle, list[Delta]] = {}
    while engine.has_work():
        for delta in engine.step():
            deltas.setdefault(delta.handle, []).append(delta)
    return deltas


def answer(deltas: list[Delta], index: int = 0) -> list[int]:
    return [i for delta in deltas if delta.index == index for i in delta.token_ids]


def test_a_prompt_longer_than_the_cache_is_refused_at_once_and_blocks_nobody(tiny: Tiny) -> None:
    engine = sized(tiny("*-"), slots=2, pages=3)
    assert engine.capacity == 3 * PAGE
    with pytest.raises(ValueError, match=f"prompt_ids has {3 * PAGE} tokens; the cache holds {3 * PAGE}"):
        engine.submit(Request(prompt_ids=ids(3 * PAGE), sampling=GREEDY))
    handle = engine.submit(Request(prompt_ids=ids(5), sampling=GREEDY))
    assert len(answer(run(engine)[handle])) == 8


def test_an_answer_that_fills_the_cache_ends_there_and_says_so(tiny: Tiny) -> None:
    engine = sized(tiny("*-"), slots=1, pages=2)
    handle = engine.submit(Request(prompt_ids=ids(2 * PAGE - 4), sampling=replace(GREEDY, max_tokens=50)))
    deltas = run(engine)[handle]
    # the last token is drawn and need not be fed
    assert len(answer(deltas)) == 5 and deltas[-1].finish_reason == "length"


def test_a_cache_for_not_even_one_sequence_is_refused_with_what_it_needs(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="cache_bytes=1000: one sequence needs .* bytes of state"):
        _ = Engine(tiny(), limits=Limits(cache_bytes=1000)).core
    with pytest.raises(ValueError, match="step_tokens=0"):
        Limits(step_tokens=0)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_the_bits_of_a_sequence_do_not_depend_on_the_batch_around_it(
    tiny: Tiny, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.engine import core
    from plait.model.hybrid import build

    model = build(tiny().config, recipe=recipe)
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    settle = Core._settle

    def watched(self: Core, rows: list[core.Sequence], logits: torch.Tensor) -> None:
        for row, one in zip(rows, logits, strict=True):
            seen.setdefault(tuple(row.row.prompt), []).append(one.clone())
        settle(self, rows, logits)

    monkeypatch.setattr(Core, "_settle", watched)
    prompts = [ids(n, seed=n) for n in (3, 64, 65, 130, 200, 17, 18)]
    requests = [Request(prompt_ids=prompt, sampling=replace(GREEDY, max_tokens=12)) for prompt in prompts]
    engine = Engine(model, limits=Limits(prefix_bytes=0))
    for request in requests:
        engine.submit(request)
        run(engine)
    alone, seen = seen, {}
    engine = Engine(model, limits=Limits(prefix_bytes=0, step_tokens=70))
    for request in requests:
        engine.submit(request)
        engine.step()
    # what is set aside with its memory comes back as it was
    engine.core.scheduler.set_aside(engine.core.scheduler.running[0])
    run(engine)
    assert engine.load().preemptions == 1
    for prompt in prompts:
        assert all(torch.equal(a, b) for a, b in zip(alone[prompt], seen[prompt], strict=True)), len(prompt)


def test_answers_of_one_request_share_its_prompt(tiny: Tiny) -> None:
    model = tiny()
    engine = Engine(model, limits=Limits(prefix_bytes=0))
    sampling = Sampling(max_tokens=10, temperature=1.0, seed=5, ignore_eos=True)
    prompt = ids(2 * PAGE + 7)
    handle = engine.submit(Request(prompt_ids=prompt, sampling=sampling, n=4))
    peak, deltas = 0, []
    while engine.has_work():
        deltas += engine.step()
        peak = max(peak, engine.load().pages)
    assert engine.load().prompt_tokens == len(prompt)
    # two whole pages together, and the begun one for each
    assert peak == 2 + 4
    answers = [answer(deltas, index) for index in range(4)]
    assert answers[0] == next(Engine(model).generate(list(prompt), sampling)).token_ids
    assert len({tuple(a) for a in answers}) == 4
    # the same answers where they come one after the other
    few = sized(model, slots=1, pages=12, prefix_bytes=0)
    again = run_one(few, Request(prompt_ids=prompt, sampling=sampling, n=4))
    assert [answer(again, index) for index in range(4)] == answers
    assert handle.origin is None and engine.load().pages == 0


def test_more_answers_than_slots_come_one_after_the_other(tiny: Tiny) -> None:
    engine = sized(tiny(), slots=2, pages=12)
    handle = engine.submit(Request(prompt_ids=ids(70), sampling=GREEDY, n=5))
    deltas = run(engine)[handle]
    assert len({tuple(answer(deltas, index)) for index in range(5)}) == 1 and len(answer(deltas, 4)) == 8


def test_a_second_turn_reads_only_what_is_new_and_a_shared_beginning_from_its_second_use_on(tiny: Tiny) -> None:
    engine = Engine(tiny(), limits=Limits(piece=32))
    first = engine.submit(Request(prompt_ids=ids(300), sampling=GREEDY))
    told = (*ids(300), *answer(run(engine)[first]))
    engine.submit(Request(prompt_ids=(*told, 1, 2, 3), sampling=GREEDY))
    before = engine.load()
    run(engine)
    after = engine.load()
    # the last token of the answer was not fed; then three new ones
    assert (after.prompt_tokens - before.prompt_tokens, after.prefix_hits) == (4, 1)
    assert after.prefix_tokens == 307
    system = ids(200, seed=9)
    for i, read in enumerate((250, 250, 250 - 192)):
        before = engine.load().prompt_tokens
        engine.submit(Request(prompt_ids=(*system, *ids(50, seed=20 + i)), sampling=GREEDY))
        run(engine)
        assert engine.load().prompt_tokens - before == read, i


def test_snapshots_stay_within_their_bytes_and_give_way_to_requests(tiny: Tiny) -> None:
    model = tiny()
    slot = Engine(model).core.pool.slot_bytes
    engine = sized(model, slots=2, pages=8, prefix_bytes=6 * slot, piece=64)
    for i in range(12):
        engine.submit(Request(prompt_ids=ids(70 + i, seed=i), sampling=GREEDY))
        run(engine)
        assert engine.load().prefix_bytes <= 6 * slot
    assert engine.load().prefix_entries
    # all eight pages are wanted
    engine.submit(Request(prompt_ids=ids(8 * PAGE - 10, seed=99), sampling=GREEDY))
    assert len(answer(next(iter(run(engine).values())))) == 8


def test_what_lies_beside_the_pools_is_told(tiny: Tiny) -> None:
    model = tiny()
    engine = Engine(model, limits=Limits(guesses=2, piece=32), draft=tiny())
    core = engine.core
    engine.submit(Request(prompt_ids=ids(70), sampling=GREEDY))
    run(engine)
    # shortly before the end of the prompt, and at the end of the answer
    assert engine.load().prefix_entries == 2
    assert engine.load().beside_bytes == 2 * core.pool.slot_bytes
    handle = engine.submit(Request(prompt_ids=ids(9), sampling=GREEDY, n=2))
    while handle.origin is None:
        engine.step()
    assert engine.load().beside_bytes == 3 * core.pool.slot_bytes
    engine.step()
    engine.step()
    before = engine.load().beside_bytes
    # the guesser has a state for each, and keys of what it has read
    most = sum(core.pool.bytes_of(len(s.ids)) for s in handle.sequences)
    assert 4 * core.pool.slot_bytes < before < 2 * core.pool.slot_bytes + most
    lease = handle.sequences[1].lease
    assert lease is not None
    n_bytes = core.pool.bytes_of(lease.n_tokens)
    core.scheduler.set_aside(handle.sequences[1])
    assert engine.load().beside_bytes == before + n_bytes


def test_a_prompt_that_waits_is_hashed_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(data: bytes, digest_size: int):
        hashed.append(len(data))
        return hashlib.blake2b(data, digest_size=digest_size)

    engine = sized(tiny("*-"), slots=2, pages=8, prefix_bytes=1 << 30)
    engine.submit(Request(prompt_ids=ids(3 * PAGE), sampling=replace(GREEDY, max_tokens=30)))
    engine.step()
    monkeypatch.setattr("plait.engine.prefix.hashlib", SimpleNamespace(blake2b=counted))
    engine.submit(Request(prompt_ids=ids(6 * PAGE), sampling=GREEDY))
    for _ in range(20):
        engine.step()
    assert engine.load().waiting == 1
    run(engine)
    # its own six pages, and none of the other's anew
    assert len(hashed) == 6


def test_answers_whose_shared_prompt_was_given_up_do_not_wait_for_the_first_to_end(tiny: Tiny) -> None:
    engine = Engine(tiny(), limits=Limits(prefix_bytes=0))
    sampling = replace(GREEDY, max_tokens=40)
    handle = engine.submit(Request(prompt_ids=ids(70), sampling=sampling, n=3))
    while handle.origin is None:
        engine.step()
    handle.leave_origin(engine.core.pool)
    engine.step()
    engine.step()
    assert all(s.row.ids for s in handle.sequences)
    run(engine)
    assert len({tuple(s.row.ids) for s in handle.sequences}) == 1


def test_snapshots_are_not_given_up_for_a_prompt_that_does_not_fit_all_the_same(tiny: Tiny) -> None:
    engine = sized(tiny("*-"), slots=2, pages=8, prefix_bytes=1 << 30, piece=64)
    engine.submit(Request(prompt_ids=ids(100), sampling=GREEDY))
    run(engine)
    kept = engine.load().prefix_entries
    assert kept == 2
    # six pages are wanted while four are in use, two are free and two are snapshots': no matter how many of these go
    long = engine.submit(Request(prompt_ids=ids(230, seed=1), sampling=replace(GREEDY, max_tokens=20)))
    engine.step()
    engine.submit(Request(prompt_ids=ids(6 * PAGE - 10, seed=2), sampling=GREEDY))
    engine.step()
    assert engine.load().waiting == 1 and engine.load().prefix_entries >= kept
    assert set(run(engine)) >= {long}


def test_a_session_goes_on_bit_by_bit_and_stays_usable(tiny: Tiny, tmp_path: object) -> None:
    from pathlib import Path

    model, path = tiny(), Path(str(tmp_path)) / "one.session"
    engine = Engine(model, limits=Limits(prefix_bytes=0))
    sampling = replace(GREEDY, max_tokens=6)
    handle = engine.submit(Request(prompt_ids=ids(75), sampling=sampling, keeps_session=True))
    first = answer(run(engine)[handle])
    assert handle.session is not None and handle.session.ids == [*ids(75), *first[:-1]]
    handle.session.save(path, model)
    session = Session.load(path, model)
    # a new engine, as after a restart; twice from the same session
    wanted = next(Engine(model).generate([*ids(75)], replace(GREEDY, max_tokens=16))).token_ids
    for _ in range(2):
        fresh = Engine(model, limits=Limits(prefix_bytes=0))
        again = Request(prompt_ids=(*ids(75), *first), sampling=replace(GREEDY, max_tokens=10), session=session)
        deltas = run_one(fresh, again)
        assert first + answer(deltas) == wanted
        assert fresh.load().prompt_tokens == 1
        usage = deltas[-1].usage
        assert usage is not None and usage.cached_tokens == 80
    kept = {name: t.clone() for name, t in handle.session.cache.tensors().items()} if handle.session.cache else {}
    assert session.cache is not None
    assert all(torch.equal(t, kept[name]) for name, t in session.cache.tensors().items())


def run_one(engine: Engine, request: Request) -> list[Delta]:
    handle = engine.submit(request)
    return run(engine)[handle]


def test_memory_of_an_answer_grows_by_keys_and_values_only_and_by_as_much_as_computed(tiny: Tiny) -> None:
    model = tiny()
    cost = model.config.cost()
    engine = Engine(model, limits=Limits(prefix_bytes=0))
    engine.submit(Request(prompt_ids=ids(10), sampling=replace(GREEDY, max_tokens=3 * PAGE)))
    pool, used = engine.core.pool, []
    while engine.has_work():
        engine.step()
        used.append(engine.load().pages)
    per_page = PAGE * cost.kv_numbers_per_token * 4
    assert pool.page_bytes == per_page
    assert pool.slot_bytes == (cost.ssm_numbers + cost.conv_numbers) * 4
    # after step i the tokens fed are the prompt and i - 1 of the answer; the next one's place is taken with it
    assert used[:-1] == [-(-max(10 + i, 11) // PAGE) for i in range(len(used) - 1)]
    # what is allocated is what is counted
    load, n_bytes = engine.load(), 0
    for state in pool.cache.states:
        if isinstance(state, PagedKV):
            n_bytes += state.k.nbytes + state.v.nbytes
        elif isinstance(state, SlotState):
            n_bytes += state.conv.nbytes + state.ssm.nbytes
    assert n_bytes == load.cache_bytes + pool.slot_bytes + pool.page_bytes


def test_higher_priority_begins_first_and_waiting_outgrows_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.engine.scheduler.PATIENCE", 16)
    engine = sized(tiny(), slots=1, pages=6)
    ends: list[str] = []
    engine.submit(Request(prompt_ids=(1,), sampling=GREEDY, request_id="running"))
    engine.step()
    engine.submit(Request(prompt_ids=(2,), sampling=GREEDY, request_id="low"))
    for i in range(12):
        engine.submit(Request(prompt_ids=(3,), sampling=GREEDY, request_id=f"high {i}", priority=2))
    while engine.has_work():
        ends += [delta.handle.request_id for delta in engine.step() if delta.finish_reason]
    assert ends[:2] == ["running", "high 0"]
    # 2 priorities are worth 32 steps of waiting, about four answers; but those waited as long: it is last of them
    assert ends[-1] == "low" and engine.load().peak_wait_steps > 90


def test_a_late_stream_of_urgent_requests_cannot_starve_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.engine.scheduler.PATIENCE", 4)
    engine = sized(tiny(), slots=1, pages=6)
    low = engine.submit(Request(prompt_ids=(2,), sampling=replace(GREEDY, max_tokens=2)))
    engine.core.scheduler.waiting[0].queued_step = 0
    first = engine.submit(Request(prompt_ids=(3,), sampling=GREEDY, priority=3))
    for _ in range(130):
        engine.step()
        if low.is_done:
            break
        # there is always a more urgent one, just arrived
        engine.submit(Request(prompt_ids=(3,), sampling=GREEDY, priority=3))
    # only those that came within its first 12 steps were before it, eight or nine steps each
    assert first.is_done and low.is_done


def test_short_prompts_do_not_wait_for_a_long_one(tiny: Tiny) -> None:
    engine = Engine(tiny(), limits=Limits(step_tokens=64, piece=32))
    long = engine.submit(Request(prompt_ids=ids(2000), sampling=GREEDY))
    short = [engine.submit(Request(prompt_ids=ids(20, seed=i), sampling=GREEDY)) for i in range(3)]
    steps = 0
    while not all(handle.is_done for handle in short):
        engine.step()
        steps += 1
    assert steps < 20 and not long.is_done and long.sequences[0].lease is not None
    # and it has gone on meanwhile
    assert long.sequences[0].lease.n_tokens >= 8 * 32


def test_logits_that_are_no_numbers_end_their_sequence_only(tiny: Tiny) -> None:
    model = tiny()
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    engine = Engine(model)
    bad, good = (engine.submit(Request(prompt_ids=(i, 3), sampling=GREEDY)) for i in (7, 8))
    # a head tied to the embedding would break everybody's
    assert not model.config.ties_embeddings
    deltas = run(engine)
    assert deltas[bad][-1].finish_reason == "error" and "not numbers" in (deltas[bad][-1].error or "")
    assert len(answer(deltas[good])) == 8
    again = engine.submit(Request(prompt_ids=(9, 3), sampling=GREEDY))
    assert len(answer(run(engine)[again])) == 8


@pytest.mark.parametrize(("state", "kv"), [("bf16", "bf16"), ("fp16-sr", "fp8"), ("int8-sr", "int8")])
def test_memory_of_fewer_bits_changes_little_and_takes_as_much_less(tiny: Tiny, state: str, kv: str) -> None:
    model = tiny(init_std=0.05)
    prompt, answers = ids(150), {}
    sampling = replace(GREEDY, max_tokens=20, logprobs=0)
    plain, few = (Engine(model, limits=Limits(prefix_bytes=0, **forms)) for forms in ({}, {"state": state, "kv": kv}))
    for name, engine in (("plain", plain), ("few", few)):
        deltas = run_one(engine, Request(prompt_ids=prompt, sampling=sampling))
        answers[name] = [logprob.logprob for delta in deltas for logprob in delta.logprobs or ()]  # type: ignore[attr-defined]
    assert answers["plain"][0] == pytest.approx(answers["few"][0], abs=0.05)
    bits = {"bf16": 16, "fp16-sr": 16, "fp8": 8, "int8": 12, "int8-sr": 10}
    cost, pool = model.config.cost(), few.core.pool
    # int8 has a float32 for 8 numbers of a head, and for 16 of a state
    assert pool.page_bytes == PAGE * cost.kv_numbers_per_token * bits[kv] // 8
    assert pool.slot_bytes == cost.conv_numbers * 4 + cost.ssm_numbers * bits[state] // 8
    # the same beside others, set aside in the middle, and from a fork
    handles = [few.submit(Request(prompt_ids=prompt, sampling=sampling, n=2)) for _ in range(2)]
    found: dict[tuple[Handle, int], list[float]] = {}
    for step in range(200):
        if step == 9:
            few.core.scheduler.set_aside(few.core.scheduler.running[-1])
        for delta in few.step():
            found.setdefault((delta.handle, delta.index), []).extend(x.logprob for x in delta.logprobs or ())  # type: ignore[attr-defined]
    assert len(found) == 4 and all(handle.is_done for handle in handles)
    for logprobs in found.values():
        assert logprobs == pytest.approx(answers["few"], abs=1e-4)


def test_unknown_numbers_are_refused_by_name(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="state_form='fp8'.* fp32, bf16, fp16-sr, int8-sr"):
        _ = Engine(tiny(), limits=Limits(state="fp8")).core
