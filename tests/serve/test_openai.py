"""OpenAI's official client against a server over a tiny model."""

import json
import math
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tests.serve.conftest import WORDS, run_server, wait_until

from plait.engine.worker import Worker
from plait.serve.limits import Limits
from plait.serve.served import Served
from plait.text.bpe import train_bpe
from plait.text.chat import CHATML

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the quick brown"}]


@pytest.fixture
def client(live) -> openai.OpenAI:
    return live.client


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_is_answered_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=8, seed=1)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    def ask(**more):
        return client.chat.completions.create(model="tiny", messages=ASK, max_tokens=24, temperature=0, **more)

    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_the_same_seed_gives_the_same_text_and_n_answers_differ(client: openai.OpenAI) -> None:
    def ask(seed: int):
        found = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, seed=seed, n=3)
        return [choice.message.content for choice in found.choices]

    assert ask(7) == ask(7)
    assert len(set(ask(7))) > 1
    assert ask(7) != ask(8)


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    def ask(**more):
        found = client.completions.create(model="tiny", prompt="the quick", max_tokens=40, temperature=0, **more)
        return found.choices[0]

    whole = ask().text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = ask(stop=[middle])
    assert stopped.text == whole[: whole.index(middle)] and stopped.finish_reason == "stop"


def test_completions_take_texts_ids_and_several_of_both(client: openai.OpenAI, tokenizer) -> None:
    ids = tokenizer.encode("the quick", add_special=True)
    texts = []
    for prompt in ("the quick", ids, ["the quick", "lazy"], [ids, ids]):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, n=2)
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        texts.append([choice.text for choice in found.choices])
    assert texts[0] == texts[1] == texts[2][:2] == texts[3][:2] == texts[3][2:]
    echoed = client.completions.create(model="tiny", prompt="the quick", max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == "the quick" + texts[0][0]


def test_completions_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=["the", "dog"], max_tokens=6, temperature=0)
    chunks = client.completions.create(model="tiny", prompt=["the", "dog"], max_tokens=6, temperature=0, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [choice.text for choice in whole.choices]


def test_log_probabilities_are_told(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = chat.choices[0].logprobs.content
    assert entries and len(entries) == chat.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        # the greedy token is the likeliest
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.bytes is not None
    done = client.completions.create(model="tiny", prompt="the", max_tokens=5, temperature=0, logprobs=2)
    found = done.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == done.usage.completion_tokens
    assert found.text_offset[0] == 0 and all(len(top) <= 2 for top in found.top_logprobs)


def test_a_bias_forces_a_token(client: openai.OpenAI, tokenizer) -> None:
    (token_id,) = tokenizer.encode("e")
    found = client.completions.create(
        model="tiny", prompt="the", max_tokens=5, temperature=0, logit_bias={str(token_id): 100}
    )
    assert found.choices[0].text == "eeeee"


def test_responses_are_given_whole_and_streamed(client: openai.OpenAI) -> None:
    asked = {
        "model": "tiny",
        "input": "the quick",
        "instructions": "Be brief.",
        "max_output_tokens": 12,
        "temperature": 0,
    }
    whole = client.responses.create(**asked)
    assert whole.status in ("completed", "incomplete") and whole.output_text
    assert whole.usage.output_tokens <= 12
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response() if whole.status == "completed" else None
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    text = "".join(e.delta for e in client.responses.create(**asked, stream=True) if e.type.endswith("text.delta"))
    assert text == whole.output_text
    assert final is None or final.output_text == whole.output_text


def test_tokenize_and_detokenize_are_inverse(live) -> None:
    import httpx

    text = "ein süßer Bär 🐻"
    found = httpx.post(f"{live.url}/tokenize", json={"prompt": text}).json()
    assert found["count"] == len(found["tokens"])
    assert httpx.post(f"{live.url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = httpx.post(f"{live.url}/tokenize", json={"messages": ASK}).json()
    assert chat["count"] > 3


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "count_legs", "description": "Count.", "parameters": SCHEMA}}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_matches_its_schema(client: openai.OpenAI, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=300, seed=3, response_format=form, stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
    else:
        assert found.choices[0].finish_reason == "stop"
        text = found.choices[0].message.content
    value = json.loads(text)
    assert set(value) == {"name", "legs"} and value["legs"] in (2, 4) and len(value["name"]) <= 5


def test_an_answer_is_one_of_the_choices(client: openai.OpenAI) -> None:
    more = {"structured_outputs": {"choice": ["fox", "bear"]}}
    found = client.completions.create(model="tiny", prompt="the", max_tokens=50, extra_body=more)
    assert found.choices[0].text in ("fox", "bear")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count_legs"}}])
def test_tools_are_called(client: openai.OpenAI, choice) -> None:
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 300, "seed": 5, "tools": [TOOL], "tool_choice": choice}
    asked["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**asked).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and call.function.name == "count_legs"
    assert json.loads(call.function.arguments)["legs"] in (2, 4)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or ()]
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert pieces[0].function.name == "count_legs" and chunks[-1].finish_reason == "tool_calls"
    # the name at first, then the arguments as they are written
    assert pieces[0].function.arguments == "" and len(pieces) > 3
    assert not any(piece.id or piece.function.name for piece in pieces[1:])
    with client.chat.completions.stream(**asked) as stream:
        told = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (gathered,) = stream.get_final_completion().choices[0].message.tool_calls
    assert len(told) > 2 and gathered.function.arguments == call.function.arguments
    # what was called and what it gave can be told
    turns = [*ASK, whole.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    again = client.chat.completions.create(model="tiny", messages=turns, max_tokens=3, tools=[TOOL])
    assert again.usage.prompt_tokens > 10


def test_a_response_calls_tools(client: openai.OpenAI) -> None:
    tool = {**TOOL["function"], "type": "function"}
    asked = {"model": "tiny", "input": "the", "max_output_tokens": 300, "tools": [tool], "tool_choice": "required"}
    # a call that is drawn at random may be too long
    asked["temperature"] = 0
    found = client.responses.create(**asked, parallel_tool_calls=False)
    (call,) = [item for item in found.output if item.type == "function_call"]
    assert call.name == "count_legs" and json.loads(call.arguments)["legs"] in (2, 4)
    events = list(client.responses.create(**asked, parallel_tool_calls=False, stream=True))
    kinds = [event.type for event in events]
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments and len(pieces) > 2


@pytest.fixture(scope="module")
def thinker(tiny_engine) -> Iterator[openai.OpenAI]:
    """A model whose template lets it reason, and opens that itself."""
    engine = tiny_engine()
    opening = "{{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking | default(true) else '') }}"
    engine.tokenizer = train_bpe([WORDS], 340)
    engine.tokenizer.chat_template = CHATML.partition("{%- if add_generation_prompt")[0] + opening
    running = run_server(lambda: Served.of(Worker(engine), "tiny", 4096), Limits())
    wait_until(lambda: running.house.phase == "ready")
    yield running.client
    running.stop()


def test_reasoning_comes_apart_from_the_answer_and_within_its_budget(thinker: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 600, "seed": 1, "extra_body": {"thinking_token_budget": 5}}
    found = thinker.chat.completions.create(**asked)
    message = found.choices[0].message
    n = found.usage.completion_tokens_details.reasoning_tokens
    assert 0 < n <= 505 and message.reasoning_content
    assert found.usage.completion_tokens > n and "think>" not in message.content
    deltas = [chunk.choices[0].delta for chunk in thinker.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    items = thinker.responses.create(
        model="tiny", input="the quick brown", max_output_tokens=600, extra_body={"thinking_token_budget": 5}
    ).output
    assert [item.type for item in items][:1] == ["reasoning"]


def test_reasoning_can_be_turned_off(thinker: openai.OpenAI) -> None:
    for more in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        found = thinker.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, extra_body=more)
        assert not getattr(found.choices[0].message, "reasoning_content", None)
        assert found.usage.completion_tokens_details.reasoning_tokens == 0
