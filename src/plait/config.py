"""Reads settings from TOML, JSON and `key=value` words into dataclasses, strictly: a wrong key or type is an error.

A field's annotation says what it takes: bool, int, float (an int will do), str, Path, Literal, `X | None`,
tuple[X, ...], tuple[A, B], dict[str, X], another dataclass, or a class with its own `from_dict`.
Where `None` is allowed and `str` is not, the word "none" means None, because TOML has no null.
"""

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)}


class ConfigError(ValueError):
    """A setting is wrong; the message names the field, the value and what would be right."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that a person who typed `name` most likely meant, or None."""
    plain = {known.lower().replace("-", "_"): known for known in names}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from plain data, strictly.

    Args:
        cls: a dataclass, or any class with a classmethod `from_dict(data)`, which is then used.
        data: what TOML or JSON gave: str, int, float, bool, None, lists and dicts.
        where: dotted name of this value inside the whole, for messages.

    Returns: an instance of cls.
    Raises: ConfigError naming the field, the value and what is expected; for an unknown key, the nearest known one.
    """
    return _read(cls, data, where)


def read_fields(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass field by field; unlike `from_dict` it may be called from within `cls.from_dict`."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__} = {data!r}: expected a table with keys {', '.join(_fields(cls))}")
    fields = _fields(cls)
    for key in data:
        if key not in fields:
            close = nearest(str(key), fields)
            hint = f'did you mean "{close}"?' if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(f'unknown key "{_dotted(where, key)}"; {hint}')
    for name, (field, hint) in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f'"{_dotted(where, name)}" is missing; expected {_spoken(hint)}')
    values = {name: _read(fields[name][1], value, _dotted(where, name)) for name, value in data.items()}
    return _named(where, lambda: cls(**values))


def to_dict(obj: object) -> Any:
    """Turn a dataclass (or anything inside one) into plain data that `from_dict` reads back.

    A class with its own `to_dict` is written by it. A field that is None by default and by value is left out.

    Raises: ConfigError for a value that neither JSON nor TOML can hold.
    """
    if hasattr(obj, "to_dict") and not isinstance(obj, type):
        return obj.to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return write_fields(obj)
    if isinstance(obj, Mapping):
        return {str(key): to_dict(value) for key, value in obj.items()}
    if isinstance(obj, (tuple, list)):
        return [to_dict(value) for value in obj]
    if isinstance(obj, Path):
        return obj.as_posix()
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    raise ConfigError(f"{obj!r} ({type(obj).__name__}) cannot be written; use numbers, text, tables and lists")


def write_fields(obj: object) -> dict[str, Any]:
    """Write a dataclass field by field; unlike `to_dict` it may be called from within `obj.to_dict`."""
    pairs = ((field, getattr(obj, name)) for name, (field, _) in _fields(type(obj)).items())
    return {field.name: to_dict(value) for field, value in pairs if not (value is None and field.default is None)}


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a TOML or JSON file, lay `key=value` words over it, and build cls.

    Args:
        path: file ending in .toml or .json; None starts from nothing, so that defaults and overrides decide.
        overrides: dotted keys, such as `optim.lr=3e-4` or `phases.0.tokens=1000`. A value is read as a TOML literal
            and, where it is none, as text.

    Raises: ConfigError as in `from_dict`, and for text that is not TOML or JSON; OSError if the file cannot be read.
    """
    data = {} if path is None else _parse(path)
    for word in overrides:
        _override(data, word)
    return _read(cls, data, "")


def bytes_of(text: str | int) -> int:
    """Return how many bytes "22GiB", "1.5 GB", "64k" or 4096 means.

    k, M, G, T, P with B are powers of 1000, with iB powers of 1024; a bare letter is read like the letter with B.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    plain = str(text).strip().lower().replace("_", "")
    number = plain.rstrip("kmgtpib ")
    unit = plain[len(number) :].strip()
    try:
        amount = float(number) * _UNITS[unit if unit.endswith("b") or not unit else unit + "b"]
        if amount < 0:
            raise ValueError
        return round(amount)
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f'{text!r} is not a size in bytes; write for example "22GiB", "500MB" or 4096') from None


@cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is neither a dataclass nor has it a from_dict")
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(hint, "from_dict"):
        return _named(where, lambda: hint.from_dict(value))
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin in (Union, types.UnionType):
        return _read_union(args, value, where, hint)
    if origin is tuple and isinstance(value, (list, tuple)) and (args[-1] is Ellipsis or len(args) == len(value)):
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_read(*pair, _dotted(where, i)) for i, pair in enumerate(zip(each, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _read(args[1], item, _dotted(where, key)) for key, item in value.items()}
    # True == 1 == 1.0 in Python, not in a settings file
    if origin is Literal and any(choice == value and type(choice) is type(value) for choice in args):
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or (hint in (bool, int, float, str) and type(value) is hint):
        return value
    close = nearest(value, map(str, args)) if origin is Literal and isinstance(value, str) else None
    raise ConfigError(_wrong(where, value, hint) + (f'; did you mean "{close}"?' if close else ""))


def _read_union(args: tuple[Any, ...], value: Any, where: str, hint: Any) -> Any:
    if type(None) in args and (value is None or (value == "none" and str not in args)):
        return None
    ways = [arg for arg in args if arg is not type(None)]
    for way in ways:
        try:
            return _read(way, value, where)
        except ConfigError:
            # with one way to read it, that way's message says more than the union's
            if len(ways) == 1:
                raise
    raise ConfigError(_wrong(where, value, hint))


def _parse(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: settings end in .toml or .json, not {path.suffix or 'nothing'!r}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a table of settings, found a {type(data).__name__}")
    return data


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [key for key, _ in pairs]
        raise ConfigError(f'key "{next(n for n in names if names.count(n) > 1)}" appears twice; keep one')
    return data


def _override(data: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not all((*path, last)):
        raise ConfigError(f"{word!r} is not an override; write key=value, for example optim.lr=3e-4")
    here: Any = data
    for part in path:
        here = here.setdefault(part, {}) if isinstance(here, dict) else here[_place(here, part, word)]
    here[last if isinstance(here, dict) else _place(here, last, word)] = _literal(text)


def _place(here: Any, part: str, word: str) -> int:
    if not isinstance(here, list):
        raise ConfigError(f'{word!r}: "{part}" lies below {here!r}, which is no table')
    if not part.isdecimal() or int(part) >= len(here):
        raise ConfigError(f'{word!r}: "{part}" is no place in a list of {len(here)}; counting starts at 0')
    return int(part)


def _literal(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # dates mean nothing to our settings, and a line break must not smuggle in a second key
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, (bool, int, float, str, list, dict)) else text


def _named(where: str, build: Any) -> Any:
    # a class does not know where it stands; what it finds wrong with itself is told with the place
    try:
        return build()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _wrong(where: str, value: Any, hint: Any) -> str:
    return f"{where or 'value'} = {value!r}: expected {_spoken(hint)}"


def _spoken(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else _spoken(arg) for arg in args)
    if origin is tuple:
        endless = args[-1] is Ellipsis
        return f"a list of {_spoken(args[0])}" if endless else f"a list of {', '.join(map(_spoken, args))}"
    if origin is dict:
        return f"a table of {_spoken(args[1])}"
    if hint is Path:
        return "a path"
    return "a table" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def _dotted(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
