"""Reads JSON into dataclasses within bounds, and writes the same bounds as JSON Schema, so that documents cannot lie.

A field's annotation says what it takes: bool, int, float (an int will do), str, Literal, object (any JSON),
tuple[X, ...], dict[str, X], another dataclass, a union of these that differ in their JSON type. `Annotated[X,
Limit(...)]` adds bounds. A field with a default may be null or left out. A key that is not known is an error, except in
a dataclass with `OPEN = True`, which drops it.
"""

import dataclasses
import difflib
import gc
import json
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from plait.serve.error import RequestError

T = TypeVar("T")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", object: "a JSON value"}
_JSON = {bool: "boolean", int: "integer", float: "number", str: "string"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Bounds. low, high: of a number, themselves allowed; above: its lower bound, itself not allowed.
    least, most: characters of a text, items of a list, keys of an object. help: a line for the reader of the schema."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    least: int = 0
    most: int | None = None
    help: str = ""


def parse(body: bytes) -> object:
    """JSON text to plain data, without what JSON does not have and Python's reader lets through.

    Raises: RequestError for anything but JSON, NaN, infinities, and nesting beyond reason.
    """
    # a million small lists would set off the collector hundreds of times, which nobody could interrupt
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(body, parse_constant=_no_constant, parse_float=_finite)
    except RequestError:
        raise
    except RecursionError:
        raise RequestError("the body nests too deeply") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    finally:
        if collects:
            gc.enable()


def read(cls: type[T], data: object, where: str = "") -> T:
    """Build a dataclass from plain data, strictly.

    Args:
        cls: a dataclass whose fields are annotated as above.
        data: what `parse` gave.
        where: dotted name of this value inside the whole.

    Raises: RequestError naming the field, the value and what is expected.
    """
    if not isinstance(data, Mapping):
        raise RequestError(f"{where or 'the body'} is {_shown(data)}, expected an object", where or None)
    fields = _fields(cls)
    is_open = getattr(cls, "OPEN", False)
    values = {}
    for key, value in data.items():
        at = f"{where}.{key}" if where else str(key)
        if key not in fields:
            if is_open:
                continue
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(fields)}"
            raise RequestError(f"{_shown(key)} is no field of {where or 'this request'}; {hint}", at[:128])
        field, kind = fields[key]
        if value is None and _optional(field):
            continue
        values[key] = _value(kind, value, at)
    for name, (field, _) in fields.items():
        if name not in values and not _optional(field):
            at = f"{where}.{name}" if where else name
            raise RequestError(f"{at} is missing", at)
    try:
        return cls(**values)
    except RequestError as error:
        # a check of the dataclass's own says "is ..." of its field; here is known where that stands
        at = ".".join(name for name in (where, error.param) if name)
        raise RequestError(f"{at or 'the body'} {error.message}", at or None) from None


def schema(cls: type, found: dict[str, object]) -> dict[str, object]:
    """JSON Schema of a dataclass.

    Args:
        found: takes the schema of it and of every dataclass inside under its name.

    Returns: a reference into `#/components/schemas`.
    """
    if cls.__name__ not in found:
        found[cls.__name__] = {}
        fields = _fields(cls)
        properties = {name: _described(kind, found, _optional(field)) for name, (field, kind) in fields.items()}
        found[cls.__name__] = {
            "type": "object",
            "description": (cls.__doc__ or "").split("\n")[0],
            "properties": properties,
            "required": [name for name, (field, _) in fields.items() if not _optional(field)],
            "additionalProperties": getattr(cls, "OPEN", False),
        }
    return {"$ref": f"#/components/schemas/{cls.__name__}"}


def _value(kind: Any, value: object, where: str) -> Any:
    kind, limit = _bounds(kind)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = get_args(kind)
        fitting = next((option for option in options if _fits(option, value)), None)
        if fitting is None:
            raise RequestError(f"{where} is {_shown(value)}, expected {_spoken(kind)}", where)
        return _value(fitting, value, where)
    if not _fits(kind, value):
        raise RequestError(f"{where} is {_shown(value)}, expected {_spoken(kind)}", where)
    if kind in (int, float) and isinstance(value, int | float):
        _check_number(value, limit, where)
        return kind(value)
    if isinstance(value, str | list | dict):
        _check_length(value, limit, where)
    if origin is tuple and isinstance(value, list):
        each = get_args(kind)[0]
        if _all_fit(each, value):
            return tuple(value)
        return tuple(_value(each, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        each = get_args(kind)[1]
        return {key: _value(each, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return read(kind, value, where)
    return value


def _all_fit(kind: Any, values: list[object]) -> bool:
    """Whether these are whole numbers within bounds: a million token ids are judged at once."""
    kind, limit = _bounds(kind)
    if kind is not int or not values or set(map(type, values)) != {int}:
        return False
    low, high = min(values), max(values)  # type: ignore[type-var]
    try:
        _check_number(low, limit, "")  # type: ignore[arg-type]
        _check_number(high, limit, "")  # type: ignore[arg-type]
    except RequestError:
        # one by one, to name the first that is wrong
        return False
    return True


def _fits(kind: Any, value: object) -> bool:
    """Whether the JSON type is right; of a list, that of its first item."""
    kind, _ = _bounds(kind)
    origin = get_origin(kind)
    if kind is object:
        return True
    if origin is Literal:
        # True == 1, but the two are not the same JSON
        return any(type(value) is type(option) and value == option for option in get_args(kind))
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in get_args(kind))
    if origin is tuple:
        return isinstance(value, list) and (not value or _fits(get_args(kind)[0], value[0]))
    if origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        # JSON knows one kind of number: 2.0 is whole
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    return isinstance(value, kind)


def _check_number(value: int | float, limit: Limit, where: str) -> None:
    low, high, above = limit.low, limit.high, limit.above
    # comparing whole numbers of any size with bounds is exact, where turning them into floats may overflow
    if (
        (low is not None and value < low)
        or (above is not None and value <= above)
        or (high is not None and value > high)
    ):
        least = f"from {low:g}" if low is not None else f"above {above:g}" if above is not None else ""
        most = "" if high is None else f"to {high:g}" if low is not None else f"at most {high:g}"
        raise RequestError(f"{where} is {_shown(value)}, expected a number {least} {most}".rstrip(), where)
    if not -(2**63) <= value < 2**64:
        raise RequestError(f"{where} is {_shown(value)}, a number beyond 64 bits", where)


def _check_length(value: str | list | dict, limit: Limit, where: str) -> None:
    noun = {str: "characters", list: "items", dict: "keys"}[type(value)]
    if len(value) < limit.least:
        raise RequestError(f"{where} has {len(value)} {noun}, needed are {limit.least}", where)
    if limit.most is not None and len(value) > limit.most:
        raise RequestError(f"{where} has {len(value)} {noun}, allowed are {limit.most}", where)


def _described(kind: Any, found: dict[str, object], optional: bool = False) -> dict[str, object]:
    kind, limit = _bounds(kind)
    plain = _plain_schema(kind, found)
    names = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
    length = {"string": "Length", "array": "Items", "object": "Properties"}.get(str(plain.get("type")), "")
    plain.update((name, value) for key, name in names.items() if (value := getattr(limit, key)) is not None)
    if length and limit.least:
        plain[f"min{length}"] = limit.least
    if length and limit.most is not None:
        plain[f"max{length}"] = limit.most
    described: dict[str, object] = {"anyOf": [plain, {"type": "null"}]} if optional and plain else plain
    if limit.help:
        described["description"] = limit.help
    return described


def _plain_schema(kind: Any, found: dict[str, object]) -> dict[str, object]:
    origin, args = get_origin(kind), get_args(kind)
    if kind is object:
        return {}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_described(option, found) for option in args if option is not types.NoneType]}
    if origin is tuple:
        return {"type": "array", "items": _described(args[0], found)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _described(args[1], found)}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return schema(kind, found)
    bounds: dict[str, object] = {"minimum": -(2**63), "maximum": 2**64 - 1} if kind is int else {}
    return bounds | {"type": _JSON[kind]}


def _spoken(kind: Any) -> str:
    kind, _ = _bounds(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(option) for option in args if option is not types.NoneType)
    if origin is tuple:
        return f"a list of {_spoken(args[0]).removeprefix('a ')}"
    return _NAMES.get(kind, "an object")


def _bounds(kind: Any) -> tuple[Any, Limit]:
    if get_origin(kind) is Annotated:
        inner, limit = get_args(kind)
        return inner, limit
    return kind, Limit()


@cache
def _fields(cls: type) -> dict[str, tuple["dataclasses.Field[Any]", Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls)}


def _optional(field: "dataclasses.Field[Any]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "a number of very many digits"
    text = repr(value) if not isinstance(value, str) else repr(value[:64])
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _no_constant(name: str) -> object:
    raise RequestError(f"the body holds {name}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise RequestError(f"the body holds {text[:32]}, a number too large")
    return value
