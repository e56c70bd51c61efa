"""Run a stranger's Jinja template without giving it attributes, endless loops or endless memory.

Jinja's own immutable sandbox keeps templates away from Python's internals and from changing what they are given. This
file adds a budget: every turn of a loop, every call of a macro and every text that is built is counted, and a template
that asks for too much ends with an error. What is counted is what templates can do cheaply to become large; the few
filters that build large texts in one stroke and that no chat template needs are not offered at all.
"""

import json
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_SECONDS = 3.0
_CHARACTERS = 1 << 28
_TEMPLATE_CHARACTERS = 1 << 20
_NUMBER = 100_000
_NOT_OFFERED = ("center", "format", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_PER_ITEM = 16


@dataclass(slots=True)
class _Budget:
    characters: int = _CHARACTERS
    # time of this thread alone, so that a busy machine refuses nothing
    until: float = field(default_factory=lambda: time.thread_time() + _SECONDS)

    def take(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError(f"it builds more than {_CHARACTERS} characters")
        if time.thread_time() > self.until:
            raise SecurityError(f"it works longer than {_SECONDS:g} s")


_BUDGET: ContextVar[_Budget | None] = ContextVar("template budget", default=None)


def _take(characters: int) -> None:
    budget = _BUDGET.get()
    # None while a template is compiled, when constant expressions are folded
    if budget is not None:
        budget.take(characters)


def _weigh(value: object) -> object:
    """Count the text that printing this value would give, and hand the value on."""
    if isinstance(value, str):
        _take(len(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            _take(_PER_ITEM)
            _weigh(key)
            _weigh(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _take(_PER_ITEM)
            _weigh(item)
    return value


class _Counted(NodeTransformer):
    """Rewrites a parsed template so that loops, macros and joins of text report to the budget."""

    def _with_tick(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(constant + _PER_ITEM)])).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_tick  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("join_text", node.nodes).set_lineno(node.lineno)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Generation(Extension):
    """`{% generation %}` blocks, which mark what the assistant wrote, are rendered as if the mark were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_weigh)
        del self.globals["lipsum"]
        for name in _NOT_OFFERED:
            del self.filters[name]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _tojson
        for name in ("indent", "replace", "join", "string"):
            self.filters[name] = _weighed(self.filters[name])

    def tick(self, characters: int) -> None:
        _take(characters)

    def join_text(self, *parts: object) -> str:
        return "".join(str(_weigh(part)) for part in parts)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: object, /, *args: object, **kwargs: object) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        # str.format comes wrapped; what it is bound to sits one step deeper
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, str(getattr(obj, "__name__", "")), args)
        return super().call(context, obj, *args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _check_operation(operator: str, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = abs(right) * left.bit_length() if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _NUMBER:
            raise SecurityError(f"it computes a number of {bits} bits")
    elif operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(items, str | list | tuple) and isinstance(times, int):
                _take(len(items) * max(times, 0))
    elif operator == "+":
        _take(sum(len(side) for side in (left, right) if isinstance(side, str | list | tuple)))
    elif isinstance(left, str):
        _check_widths(left)


def _check_method(owner: str, name: str, args: tuple[object, ...]) -> None:
    if any(isinstance(arg, int) and abs(arg) > _NUMBER for arg in args):
        raise SecurityError(f"it calls {name} with a number beyond {_NUMBER}")
    if name in ("format", "format_map"):
        _check_widths(owner)
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        _take(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _take(len(owner) * len(args[0]))
        _weigh(args[0])
    elif name == "expandtabs":
        _take(owner.count("\t") * max((arg for arg in args if isinstance(arg, int)), default=8))
    else:
        _take(len(owner))


def _check_widths(pattern: str) -> None:
    # a width of many digits, or one taken from the arguments, pads to any length
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{", pattern):
        raise SecurityError("it formats to an unreasonable width")


def _weighed(work: Callable[..., object]) -> Callable[..., object]:
    def counted(*args: object, **kwargs: object) -> object:
        values = [value for value in (*args, *kwargs.values()) if not hasattr(value, "environment")]
        for value in values:
            _weigh(value)
            if isinstance(value, int) and abs(value) > _NUMBER:
                raise SecurityError(f"it uses a filter with a number beyond {_NUMBER}")
        # each character (or item) may be replaced by, or joined with, the longest of the other texts
        sizes = sorted((len(value) for value in values if isinstance(value, str | list | tuple)), reverse=True)
        if len(sizes) > 1:
            _take(sizes[0] * sizes[1])
        return work(*args, **kwargs)

    # jinja reads from these marks which first argument a filter wants
    counted.__dict__.update(work.__dict__)
    return counted


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    _check_widths(pattern)
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes for HTML; templates are written for Hugging Face's, which does not
    _weigh(value)
    if (indent if isinstance(indent, int) else len(indent or "")) > 64:
        raise SecurityError("it indents JSON by more than 64 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    if len(template) > _TEMPLATE_CHARACTERS:
        raise SecurityError(f"it is {len(template)} characters long, allowed are {_TEMPLATE_CHARACTERS}")
    environment = _Sandbox()
    tree = environment.parse(template)
    _Counted().visit(tree)
    return environment.from_string(tree)


def render_template(template: str, values: dict[str, object]) -> str:
    """Render a template in the sandbox.

    Args:
        template: Jinja text.
        values: what it sees; plain data only (text, numbers, lists, dictionaries), which it cannot change.

    Raises: ValueError if the template is wrong, refuses the values, or reaches for what it must not have.
    """
    token = _BUDGET.set(_Budget())
    try:
        pieces: list[str] = []
        for piece in _compile(template).generate(values):
            _take(len(piece))
            pieces.append(piece)
        return "".join(pieces)
    except Exception as error:
        kind = "is not allowed" if isinstance(error, SecurityError) else "failed"
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if isinstance(line, int) else ""
        reason = str(error) or type(error).__name__
        raise ValueError(f"the chat template {kind}{where}: {reason}; mend it or give another template") from error
    finally:
        _BUDGET.reset(token)
