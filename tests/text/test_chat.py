import itertools

import pytest

from plait.text.chat import CHATML, encode_chat, render
from plait.text.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CHATS = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [{"role": "system", "content": "Be brief. /no_think"}, {"role": "user", "content": "Grüße 👋"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>why</think>b"},
        {"role": "user", "content": "c /think"},
    ],
    "tools": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": '{"sun": true}'},
        {"role": "tool", "content": "[1, 2]"},
        {"role": "assistant", "content": "Sunny."},
    ],
}

# in the manner of Nemotron Nano v2: a system block always, switches inside the text, history without reasoning
NEMOTRON = """\
{%- set state = namespace(think=true) -%}
{%- for m in messages if m['role'] in ('system', 'user') -%}
  {%- if '/think' in m['content'].replace('</think>', '') -%}{%- set state.think = true -%}
  {%- elif '/no_think' in m['content'] -%}{%- set state.think = false -%}{%- endif -%}
{%- endfor -%}
{{- bos_token + '<SPECIAL_10>System\\n' -}}
{%- if messages[0]['role'] == 'system' -%}
  {{- messages[0]['content'].replace('/no_think', '').replace('/think', '').strip() -}}
{%- endif -%}
{%- if tools -%}
  {{- '\\n\\n<AVAILABLE_TOOLS>[' -}}
  {%- for tool in tools -%}{{- (tool.function if tool.function is defined else tool) | tojson -}}
  {{- ', ' if not loop.last else '' -}}{%- endfor -%}
  {{- ']</AVAILABLE_TOOLS>' -}}
{%- endif -%}
{{- '\\n\\n' -}}
{%- for m in (messages[1:] if messages[0]['role'] == 'system' else messages) -%}
  {%- if m['role'] == 'user' -%}
    {{- '<SPECIAL_11>User\\n' + m['content'].replace('/no_think', '').replace('/think', '').strip() + '\\n' -}}
  {%- elif m['role'] == 'tool' -%}
    {%- if loop.first or loop.previtem['role'] != 'tool' -%}{{- '<SPECIAL_11>User\\n<TOOL_RESPONSE>[' -}}{%- endif -%}
    {{- m['content'] -}}
    {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- ']</TOOL_RESPONSE>\\n' -}}{%- else -%}, {% endif -%}
  {%- else -%}
    {%- generation -%}
    {{- '<SPECIAL_11>Assistant\\n' + (m['content'] or '').split('</think>')[-1].strip() -}}
    {%- if m.tool_calls -%}{{- '<TOOLCALL>[' -}}
      {%- for call in m.tool_calls -%}
        {{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson ~ '}' -}}
        {%- if loop.last -%}{%- break -%}{%- endif -%}{{- ', ' -}}
      {%- endfor -%}
    {{- ']</TOOLCALL>' -}}{%- endif -%}
    {{- '\\n<SPECIAL_12>\\n' -}}
    {%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<SPECIAL_11>Assistant\\n' + ('<think>\\n' if enable_thinking | default(state.think) else '<think></think>') -}}
{%- endif -%}
"""
HUGGING = """\
{% macro line(m) %}
    {{ m.role | upper }}: {{ m.content | trim }}
{% endmacro %}
{% for m in messages %}
{{ line(m) }}
{% endfor %}
{{ {'a': [1, 2.5, none, true], 'b': '<&é>'} | tojson }}
{{ tools | tojson(indent=2) if tools else 'none' }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' / ') | indent(2) }}
{{ messages | length }} {{ "%s-%d" % ('x', 3) }} {{ 'ab' * 3 }} {{ [1] + [2] }} {{ range(3) | list }}
{{ strftime_now('%Y') | length }}
"""


@pytest.fixture(scope="module")
def theirs(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "data/tokenizers/bpe-4096")


@pytest.mark.parametrize(
    ("chat", "template", "tools", "prompt"),
    list(itertools.product(CHATS, ["own", "chatml", "nemotron", "hugging"], [None, TOOLS], [True, False])),
    ids=lambda value: str(value) if not isinstance(value, list) else "tools",
)
def test_rendered_text_equals_that_of_transformers(theirs, chat, template, tools, prompt):
    text = {"own": theirs.chat_template, "chatml": CHATML, "nemotron": NEMOTRON, "hugging": HUGGING}[template]
    wanted = theirs.apply_chat_template(
        CHATS[chat], chat_template=text, tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    got = render(CHATS[chat], text, tools=tools, add_generation_prompt=prompt, bos="<|bos|>", eos="<|eos|>")
    assert got == wanted


@pytest.mark.parametrize("name", ["bpe-4096", "bpe-16384", "bpe-32768", "published/phi-3"])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_ids_equal_those_of_transformers(shared, name, chat):
    from transformers import PreTrainedTokenizerFast

    folder = shared / "data/tokenizers" / name
    ours = Tokenizer.open(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>")
    wanted = theirs.apply_chat_template(CHATS[chat], chat_template=ours.chat_template, add_generation_prompt=True)
    assert encode_chat(ours, CHATS[chat]) == list(wanted["input_ids"])


def test_switches_reach_the_template():
    assert render(CHATS["one"], NEMOTRON, enable_thinking=False).endswith("<think></think>")
    assert render(CHATS["one"], NEMOTRON, enable_thinking=True).endswith("<think>\n")


def test_a_tokenizer_without_template_speaks_chatml(shared):
    tokenizer = Tokenizer.open(shared / "data/tokenizers/bpe-4096")
    tokenizer.chat_template = None
    text = tokenizer.decode(encode_chat(tokenizer, CHATS["one"]), skip_special=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<|im_end|>" in render([{"role": "user", "content": parts}], CHATML)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_found_under_any_usual_name(name):
    chat = [{"role": "assistant", "content": "x", name: "because"}]
    assert "<think>because</think>x" in render(chat, CHATML)
    assert render(chat, "{{ messages[0].thinking }}") == "because"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("hello", r"messages\[1\] is a str"),
        ({"content": "x"}, r"messages\[1\].role = None is unknown; use one of system"),
        ({"role": "bot", "content": "x"}, r"messages\[1\].role = 'bot'"),
        ({"role": "user", "contents": "x"}, r"messages\[1\] \(user\) has no content; its fields are role, contents"),
        ({"role": "user", "content": None}, r"messages\[1\].content = None"),
        ({"role": "user", "content": 7}, r"messages\[1\].content is a int"),
        ({"role": "user", "content": ["x"]}, r"messages\[1\].content\[0\] = 'x'"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, r"content\[0\].text = 1"),
        ({"role": "assistant", "tool_calls": "f()"}, r"messages\[1\].tool_calls is a str"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "arguments"),
        ({"role": "user", "content": "x", "extra": {"deep": [object()]}}, r"messages\[1\].extra.deep\[0\] is a object"),
    ],
)
def test_a_wrong_message_is_named_with_its_field(message, named):
    with pytest.raises(ValueError, match=named):
        render([{"role": "user", "content": "fine"}, message], CHATML)
