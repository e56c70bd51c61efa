"""The engine: batched = alone = the plain greedy loop, streams, stops, ends, seeds, and errors that name the field."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.engine.engine import Engine
from plait.engine.request import FinishReason, Sampling
from plait.engine.runner import room
from plait.engine.session import Session
from plait.model.hybrid import Hybrid
from plait.model.layers.attention import KVState
from plait.text.tokenizer import Tokenizer

GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
PATTERNS = ["M-M*-M", "*-*-", "MM"]

Tiny = Callable[..., Hybrid]


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [[random.randrange(384) for _ in range(n)] for n in lengths]


def greedy_loop(model: Hybrid, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_ids_equal_a_loop_over_whole_forwards(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern)
    prompts = random_prompts([1, 4, 15, 16, 17, 40, 90])
    # small groups and chunks, so that every path is taken
    engine = Engine(model, max_batch=3, prefill_chunk=20)
    answers = [c.token_ids for c in engine.generate(prompts, GREEDY)]
    assert answers == [greedy_loop(model, prompt, 24) for prompt in prompts]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_that_end_early_leave_and_the_others_go_on_unchanged(tiny: Tiny, pattern: str) -> None:
    model = tiny(pattern)
    prompts = random_prompts([30, 3, 12, 7, 18, 30])
    settings = [replace(GREEDY, max_tokens=n) for n in (1, 24, 5, 5, 17, 2)]
    alone = [next(Engine(model).generate(p, s)).token_ids for p, s in zip(prompts, settings, strict=True)]
    batches: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]) or None)
    together = list(Engine(model).generate(prompts, settings))
    hook.remove()
    assert [c.token_ids for c in together] == alone
    # prefill, then steps of ever fewer rows: nothing is computed for a finished one
    assert batches == [6, *[5] * 1, *[4] * 3, *[2] * 12, *[1] * 7]
    assert [len(c.token_ids) for c in together] == [1, 24, 5, 5, 17, 2]
    assert {c.finish_reason for c in together} == {FinishReason.LENGTH}


def test_completions_come_in_the_order_of_prompts_and_say_what_they_used(tiny: Tiny) -> None:
    prompts = random_prompts([5, 50, 1])
    first, second, third = Engine(tiny(), max_batch=1).generate(prompts, replace(GREEDY, max_tokens=3))
    assert [c.prompt_ids for c in (first, second, third)] == prompts
    assert (second.usage.prompt_tokens, second.usage.completion_tokens) == (50, 3)
    assert second.usage.cache_bytes > first.usage.cache_bytes > 0
    assert second.timings.prefill_s > 0 and second.timings.decode_s > 0


def test_a_seed_gives_the_same_tokens_whatever_the_batch_around_it(tiny: Tiny) -> None:
    engine = Engine(tiny(), max_batch=8)
    prompts = random_prompts([9, 20, 3, 31])
    settings = [Sampling(max_tokens=16, temperature=0.8, top_p=0.9, seed=seed) for seed in range(4)]
    together = [c.token_ids for c in engine.generate(prompts, settings)]
    alone = [next(engine.generate(p, s)).token_ids for p, s in zip(prompts, settings, strict=True)]
    assert together == alone
    again, other = engine.generate([prompts[0]] * 2, [settings[0], replace(settings[0], seed=77)])
    assert again.token_ids == alone[0] != other.token_ids


def test_an_end_id_ends_an_answer_and_is_no_text(tiny: Tiny, tokenizer: Tokenizer) -> None:
    free = next(Engine(tiny(), tokenizer).generate("the quick", GREEDY))
    end = free.token_ids[7]
    cut = free.token_ids[: free.token_ids.index(end) + 1]
    by_model = Engine(tiny(eos_ids=(end,)), tokenizer)
    ended = next(by_model.generate("the quick", replace(GREEDY, ignore_eos=False)))
    assert ended.token_ids == cut and ended.finish_reason == "stop"
    assert ended.text == tokenizer.decode(cut[:-1])
    asked = next(Engine(tiny(), tokenizer).generate("the quick", replace(GREEDY, stop_ids=(end,))))
    assert asked.token_ids == cut
    assert next(by_model.generate("the quick", GREEDY)).token_ids == free.token_ids


def test_a_stop_text_across_token_edges_ends_the_answer(tiny: Tiny, tokenizer: Tokenizer) -> None:
    engine = Engine(tiny(), tokenizer)
    long = replace(GREEDY, max_tokens=60)
    free = next(engine.generate("the fox", long))
    # from the middle of the text, long enough to span several tokens
    stop = free.text[20:28]
    at = free.text.index(stop)
    stream = engine.stream("the fox", replace(long, stop=(stop,)))
    pieces = list(stream)
    assert stream.completion.text == "".join(pieces) == free.text[:at]
    assert stream.completion.finish_reason == "stop"
    assert stream.completion.usage.completion_tokens < 60


@pytest.mark.parametrize("s", [GREEDY, Sampling(max_tokens=40, temperature=1.5, seed=3)], ids=["greedy", "sampled"])
def test_a_stream_joined_is_the_text_of_its_completion_and_of_generate(
    tiny: Tiny, tokenizer: Tokenizer, s: Sampling
) -> None:
    engine = Engine(tiny(), tokenizer)
    stream = engine.stream("süßer Bär 🐻", s)
    with pytest.raises(RuntimeError, match="not ended"):
        _ = stream.completion
    text = "".join(stream)
    assert text == stream.completion.text == next(engine.generate(["süßer Bär 🐻"], s)).text
    assert text == tokenizer.decode(stream.completion.token_ids)


def test_a_closed_stream_is_cancelled_and_its_session_goes_on(tiny: Tiny, tokenizer: Tokenizer) -> None:
    engine = Engine(tiny(), tokenizer)
    session = Session()
    stream = engine.stream("the lazy dog", GREEDY, session)
    for _ in range(5):
        next(stream)
    stream.close()
    done = stream.completion
    assert done.finish_reason == "cancelled" and len(done.token_ids) == 5
    assert session.ids == done.prompt_ids + done.token_ids[:-1]
    more = engine.stream(done.prompt_ids + done.token_ids, replace(GREEDY, max_tokens=19), session)
    list(more)
    whole = next(engine.generate("the lazy dog", GREEDY))
    assert done.token_ids + more.completion.token_ids == whole.token_ids
    assert more.completion.usage.cached_tokens == len(done.prompt_ids) + 4


def test_a_failure_on_the_way_leaves_an_empty_session(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    session = Session()
    stream = Engine(model).stream([1, 2, 3], GREEDY, session)
    next(stream)

    def interrupted(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert session.cache is None and session.ids == []


def test_the_tokenizer_beside_the_checkpoint_is_opened(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    model = tiny()
    model.origin = tmp_path
    assert next(Engine(model).generate("the", GREEDY)).text


def test_no_gradient_and_no_model_change(tiny: Tiny) -> None:
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    list(Engine(model).generate([[1, 2, 3]], GREEDY))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompts.0. is empty"),
        ([], "prompts is empty"),
        ([[1, 2], []], "prompts.1. is empty"),
        ([[1, 384]], "prompts.0..1. is token id 384.*0 to 383"),
        ([1, -1], "prompts.0..1. is token id -1"),
        (["a", 3], "prompts.1. is 3; expected a text or a list"),
        ([{"role": "user"}], "prompts.0..*expected a text or a list"),
    ],
)
def test_a_bad_prompt_is_refused_at_once_and_by_place(
    tiny: Tiny, tokenizer: Tokenizer, prompts: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny(), tokenizer).generate(prompts, GREEDY)  # pyright: ignore[reportArgumentType]


def test_text_without_a_tokenizer_says_what_to_do(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="prompt is a text, but there is no tokenizer; put.*or give token ids"):
        Engine(tiny()).stream("hello")
    with pytest.raises(ValueError, match="stop=.*needs a tokenizer"):
        Engine(tiny()).generate([[1]], Sampling(stop=("x",)))


def test_a_vocabulary_larger_than_the_embedding_names_both(tiny: Tiny, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} ids.*only 300 rows"):
        Engine(tiny(vocab_size=300), tokenizer)


def test_sizes_and_numbers_of_settings_are_checked(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="max_batch=0"):
        Engine(tiny(), max_batch=0)
    with pytest.raises(ValueError, match="prefill_chunk=-1"):
        Engine(tiny(), prefill_chunk=-1)
    with pytest.raises(ValueError, match="2 settings for 1 prompts"):
        Engine(tiny()).generate([[1]], [GREEDY, GREEDY])


def test_more_context_than_trained_for_is_said_but_runs(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    done = next(Engine(tiny(max_context=20)).generate([[1] * 10], GREEDY))
    assert len(done.token_ids) == 24
    assert "34 tokens of context; the model was trained for 20" in caplog.text


def test_arrays_of_ids_are_prompts(tiny: Tiny) -> None:
    engine = Engine(tiny())
    ids = [5, 300, 7]
    (wanted,) = engine.generate(ids, GREEDY)
    forms = [torch.tensor(ids), np.array(ids), [torch.tensor(ids)], [np.array(ids)], list(np.array(ids)), tuple(ids)]
    for form in forms:
        (answer,) = engine.generate(form, GREEDY)
        assert (answer.prompt_ids, answer.token_ids) == (ids, wanted.token_ids)
    assert {type(token_id) for token_id in engine.encode(np.array(ids))} == {int}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1.7, 2]], r"prompts\[0\]\[0\] is 1.7"),
        ([2, 1.7], r"prompts\[0\]\[1\] is 1.7"),
        ([[1, 2], [3, True]], r"prompts\[1\]\[1\] is True"),
        ([[1, "a"]], r"prompts\[0\]\[1\] is 'a'"),
        (torch.tensor([1.0, 2.5]), r"prompts\[0\]\[0\] is 1.0"),
        (np.array([True]), r"prompts\[0\]\[0\] is True"),
        (torch.tensor([[1, 2]]), r"prompts\[0\]\[0\] is \[1, 2\]"),
        (torch.tensor(3), r"prompts\[0\] is 3"),
    ],
)
def test_what_is_no_whole_id_is_refused_by_place_and_value(tiny: Tiny, prompts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny()).generate(prompts)  # type: ignore[arg-type]


def test_keys_and_values_are_never_copied_to_a_larger_buffer(
    tiny: Callable[..., Hybrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    grown: list[tuple[int, int]] = []
    grow = KVState._grown
    monkeypatch.setattr(
        KVState, "_grown", lambda state, old, n: (grown.append((state.length, n)), grow(state, old, n))[1]
    )
    engine = Engine(tiny(), prefill_chunk=64)
    list(engine.generate([[1] * 300, [2] * 290], Sampling(max_tokens=100, ignore_eos=True)))
    assert grown == [(0, 400)] * 2
    grown.clear()
    session = Session()
    list(engine.stream([1] * 300, Sampling(max_tokens=100, ignore_eos=True), session))
    assert grown == [(0, 400)] * 2


def test_asking_for_endless_answers_reserves_no_endless_cache(tiny: Callable[..., Hybrid]) -> None:
    model = tiny(max_context=50)
    row = Engine(model)._row([1] * 300, Sampling(max_tokens=10**12))
    assert room([row], 50) == 1324
    assert room([row], 100_000) == 100_000
