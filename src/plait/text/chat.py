"""Messages to the text, or the ids, that a model expects: chat templates."""

from collections.abc import Mapping, Sequence

from plait.text.sandbox import render_template
from plait.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Who may speak."""

_REASONING = ("reasoning_content", "reasoning", "thinking")

CHATML = """\
{%- if tools %}
<|im_start|>system
{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}
You may call these functions. Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to do so.
<tools>{{ tools | tojson }}</tools><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if not (loop.first and tools and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
{%- if message.content is string %}
{{- '<tool_response>' + message.content + '</tool_response>' if message.role == 'tool' else message.content }}
{%- elif message.content %}
{%- for part in message.content %}{{- part.text or '' }}{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Template for tokenizers that bring none: ChatML with tools and reasoning."""


def render(
    messages: Sequence[Mapping[str, object]],
    template: str,
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    add_generation_prompt: bool = True,
    bos: str = "",
    eos: str = "",
    **switches: object,
) -> str:
    """Turn a conversation into the prompt that its template describes.

    Args:
        messages: `{"role": ..., "content": ...}`; an assistant may have `tool_calls` instead of, or besides, content.
            Reasoning under any usual name (reasoning_content, reasoning, thinking) is offered under each of the first
            and the last.
        template: Jinja text, run in a sandbox.
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: end with the opening of an assistant's turn.
        bos, eos: texts of the special tokens, which templates see as bos_token and eos_token.
        switches: further names that a template knows, such as enable_thinking.

    Raises: ValueError naming the message and the field, or what is wrong with the template.
    """
    values = {name: _plain(value, name) for name, value in switches.items()}
    values |= {
        "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        "tools": None if tools is None else _plain(list(tools), "tools"),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos,
        "eos_token": eos,
    }
    return render_template(template, values)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    add_generation_prompt: bool = True,
    **switches: object,
) -> list[int]:
    """Turn a conversation into ids by the tokenizer's own template (ChatML if it has none). See `render`."""
    bos = None if tokenizer.bos_id is None else tokenizer.token_of(tokenizer.bos_id)
    eos = tokenizer.token_of(tokenizer.eos_ids[0]) if tokenizer.eos_ids else None
    template = tokenizer.chat_template or CHATML
    text = render(
        messages,
        template,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        bos=bos or "",
        eos=eos or "",
        **switches,
    )
    # the template has written every special token that belongs here
    return tokenizer.encode(text, add_special=False)


def _message(message: Mapping[str, object], where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}, expected a dictionary with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role = {role!r} is unknown; use one of {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if "content" not in message and not calls:
        raise ValueError(f"{where} ({role}) has no content; its fields are {', '.join(map(str, message))}")
    if content is None and role != "assistant":
        raise ValueError(f"{where}.content = None ({role}); only an assistant may be silent, give a text")
    _check_content(content, f"{where}.content")
    if calls is not None:
        _check_calls(calls, f"{where}.tool_calls")
    plain = {str(name): _plain(value, f"{where}.{name}") for name, value in message.items()}
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    if reasoning is not None:
        # templates disagree on the name: most read the first, gpt-oss the second
        plain = {"reasoning_content": reasoning, "thinking": reasoning} | plain
    return plain


def _check_content(content: object, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where} is a {type(content).__name__}; give a text or a list of parts")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f'{where}[{i}] = {part!r} is no part; write {{"type": "text", "text": ...}}')
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{i}].text = {part.get('text')!r} is not a text")


def _check_calls(calls: object, where: str) -> None:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where} is a {type(calls).__name__}, expected a list")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'{where}[{i}] = {call!r} is no call; write {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        if not isinstance(function.get("arguments", {}), Mapping | str):
            raise ValueError(f"{where}[{i}].function.arguments is neither a dictionary nor JSON text")


def _plain(value: object, where: str) -> object:
    # a rebuilt value has no methods but those of plain data, which is all that a sandbox can judge
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}; only text, numbers, lists and dictionaries can be rendered")
