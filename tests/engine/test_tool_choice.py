"""An answer that must be a call is one, in every template's way, with arguments that match their schemas."""

import json
import random

import jsonschema_rs
import pytest
import torch

from plait.engine.constraint import Grammars
from plait.engine.request import Sampling
from plait.engine.sampler import Draw, sample
from plait.engine.tool_choice import of_tools
from plait.text.bpe import SPECIAL_TOKENS, train_bpe
from plait.text.reasoning import MarkStream
from plait.text.tokenizer import Tokenizer, continuation
from plait.text.tools import FORMATS, Tool, ToolCall, ToolStream, gather, parameters_of

N_IDS = 400
WORDS = 'the quick "brown": fox, {"name": [1, 2.5, true, null]} <parameter=city>\nfunction</parameter>\n ' * 3
CITY = {"type": "string", "minLength": 1, "maxLength": 8}
WEATHER = {
    "type": "object",
    "properties": {"city": CITY, "days": {"enum": [1, 2, 3]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module", params=["marks are special", "marks are text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "marks are text":
        return train_bpe([WORDS], 360, ["<|eos|>"])
    made = train_bpe([WORDS], 360, [*SPECIAL_TOKENS[:8], "<tool_call>", "</tool_call>", "[TOOL_CALLS]"])
    data = json.loads(made._backend.to_str())
    for token in data["added_tokens"]:
        token["special"] = True
    return Tokenizer(type(made._backend).from_str(json.dumps(data)), None)


@pytest.mark.parametrize("name", [None, "weather"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_the_answer_is_calls_and_nothing_else(tokenizer: Tokenizer, form, name: str | None) -> None:
    ends = frozenset({tokenizer.id_of("<|eos|>") or 0})
    grammars = Grammars(tokenizer, N_IDS, ends)
    # free text in a tag would end by chance only
    tools = [_without_text(tool) for tool in TOOLS] if form.inner == "tags" else TOOLS
    made = grammars.compile(of_tools(tokenizer, form, tools, name=name))
    rng = random.Random(0)
    n_ended = 0
    for seed in range(6):
        draw = Draw(Sampling(seed=seed), [1], N_IDS, torch.device("cpu"), end_ids=ends, grammar=made.fork())
        shown = MarkStream(tokenizer, (form.open, form.close))
        stream = ToolStream(form, tools)
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        said, calls = "", list[ToolCall]()
        for _ in range(600):
            (token_id,) = sample(torch.randn(1, N_IDS, generator=generator), [draw])
            assert draw.failure is None
            draw.note(token_id)
            ended = token_id in ends or draw.done
            text, new = stream.add("" if token_id in ends else shown.add(token_id))
            said += text
            gather(calls, new)
            if ended:
                text, new = stream.finish()
                said += text
                gather(calls, new)
                n_ended += 1
                break
        else:
            continue
        assert said == "" and calls
        if name is not None:
            assert [call.name for call in calls] == [name]
        for call in calls:
            if call.name == "weather":
                jsonschema_rs.validator_for(parameters_of(tools)["weather"]).validate(json.loads(call.arguments))
    assert n_ended > 0
    grammars.close()


def test_a_choice_of_nothing_is_refused() -> None:
    tokenizer = train_bpe([WORDS], 340)
    with pytest.raises(ValueError, match="tool_choice: there is no function 'rain'; tools has weather, now"):
        of_tools(tokenizer, FORMATS["hermes"], TOOLS, name="rain")
    with pytest.raises(ValueError, match="tool_choice: tools is empty"):
        of_tools(tokenizer, FORMATS["hermes"], [])


def test_text_in_a_tag_is_free_until_its_mark(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, N_IDS, [0])
    grammar = grammars.compile(of_tools(tokenizer, FORMATS["tags"], TOOLS, name="weather"))
    city = '\n<function=weather>\n<parameter=city>\nsome <b> "words"\n{}</x>\n</parameter>\n'
    inner = city + '<parameter=unit>\n"C"\n</parameter>\n</function>\n'
    for token_id in continuation(tokenizer, f"<tool_call>{inner}</tool_call>"):
        allowed = grammar.allowed()
        assert allowed is not None and allowed[token_id], tokenizer.token_of(token_id)
        grammar.note(token_id)
    assert grammar.is_complete
    grammars.close()


def _without_text(tool: Tool) -> Tool:
    return json.loads(json.dumps(tool).replace(json.dumps(CITY), '{"enum": ["Bern", "Zug"]}'))
