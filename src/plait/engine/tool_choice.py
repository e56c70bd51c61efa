"""An answer that must be a call: a grammar in the way that the model's template writes calls."""

import json
from collections.abc import Mapping, Sequence

from plait.engine.constraint import Constraint
from plait.text.tokenizer import Tokenizer
from plait.text.tools import Tool, ToolFormat, parameters_of

# white space between values must end
_SPACES = {"whitespace_pattern": r"[ \n]{0,20}"}


def of_tools(
    tokenizer: Tokenizer, form: ToolFormat, tools: Sequence[Tool], *, name: str | None = None, several: bool = True
) -> Constraint:
    """A constraint to calls of the functions that are offered, with arguments that match their schemas.

    Args:
        tokenizer: of the model, some of whose special tokens may be marks of calls.
        form: how calls are written.
        tools: the functions.
        name: of the one to call, None for any of them.
        several: whether there may be more than one call.

    Raises: ValueError if there is no function of that name, or none at all.
    """
    offered = parameters_of(tools)
    if name is not None and name not in offered:
        raise ValueError(f"tool_choice: there is no function {name!r}; tools has {', '.join(offered) or 'none'}")
    if not offered:
        raise ValueError("tool_choice: tools is empty; give the functions that may be called")
    chosen = offered if name is None else {name: offered[name]}
    several = several and name is None
    opens, closes = (_mark(tokenizer, mark) for mark in (form.open, form.close))
    if form.inner == "tags":
        rules, one = _tags(chosen)
        return Constraint("lark", f"start: {_many(f'{opens} one {closes}', several)}\none: {one}\n{rules}")
    calls = [_call(name, schema, form.arguments) for name, schema in chosen.items()]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form.inner == "list":
        schema = {"type": "array", "items": call, "minItems": 1, "maxItems": 16 if several else 1}
        return Constraint("lark", f"start: {opens} {_json(schema)} {closes}")
    space = '"\\n"' if form.open else ""
    body = f"{opens} {space} one {space} {closes}"
    return Constraint("lark", f"start: {_many(body, several and bool(form.open))}\none: {_json(call)}")


def _call(name: str, schema: Mapping[str, object], arguments: str) -> dict[str, object]:
    properties = {"name": {"const": name}, arguments: schema}
    fields = ["name", arguments]
    return {"type": "object", "properties": properties, "required": fields, "additionalProperties": False}


def _tags(chosen: Mapping[str, Mapping[str, object]]) -> tuple[str, str]:
    """Rules of parameters, and the alternatives of whole calls."""
    rules, calls = ['text[suffix="\\n</parameter>\\n"]: /(?s:.*)/'], []
    for i, (name, schema) in enumerate(chosen.items()):
        properties, required = schema.get("properties"), schema.get("required")
        needed = required if isinstance(required, list | tuple) else ()
        parts = []
        for j, (key, wanted) in enumerate(properties.items() if isinstance(properties, Mapping) else ()):
            opens = json.dumps(f"<parameter={key}>\n")
            is_text = isinstance(wanted, Mapping) and wanted.get("type") == "string" and "enum" not in wanted
            value = "text" if is_text else f'{_json(wanted)} "\\n</parameter>\\n"'
            rules.append(f"p{i}_{j}: {opens} {value}")
            parts.append(f"p{i}_{j}" + ("" if key in needed else "?"))
        calls.append(" ".join([json.dumps(f"\n<function={name}>\n"), *parts, json.dumps("</function>\n")]))
    return "\n".join(rules), " | ".join(calls)


def _many(body: str, several: bool) -> str:
    return f'{body} ("\\n" {body}){{0,15}}' if several else body


def _json(schema: object) -> str:
    inner = dict(schema) if isinstance(schema, Mapping) else {}
    return "%json " + json.dumps(inner | {"x-guidance": _SPACES}, ensure_ascii=False)


def _mark(tokenizer: Tokenizer, mark: str) -> str:
    token_id = tokenizer.id_of(mark)
    if not mark:
        return ""
    # what is no text for the grammar is named by its number
    return f"<[{token_id}]>" if token_id is not None and tokenizer.is_special(token_id) else json.dumps(mark)
