"""Read what the files beside a tokenizer.json say: first, last and padding token, and the chat template."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IdOf = Callable[[str], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Special ids and template; every field may be missing."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    chat_template: str | None = None


def read_settings(folder: Path, id_of: IdOf) -> TokenizerSettings:
    """Collect the settings of a tokenizer folder.

    The tokenizer's own files come first (tokenizer_config.json, special_tokens_map.json). Ids at which generation stops
    (generation_config.json) join them: Nemotron Nano v2 stops at id 12 while its tokenizer says 2. The model's
    config.json is asked last, and only where the others are silent, as its ids are often defaults of a class.

    Args:
        folder: where the files are; any of them may be missing.
        id_of: token -> id, None for a token that the vocabulary lacks.

    Raises: ValueError naming the file and the field that cannot be read.
    """
    own = [_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    model = [_object(folder / name) for name in ("generation_config.json", "config.json")]

    def first(name: str) -> int | None:
        named = (id for data in own for id in _named_ids(data, f"{name}_token", id_of))
        numbered = (id for data in model for id in _numbered_ids(data, f"{name}_token_id"))
        return next(named, next(numbered, None))

    own_eos = [id for data in own for id in _named_ids(data, "eos_token", id_of)]
    own_eos += [id for data in own for id in _numbered_ids(data, "eos_token_ids")]
    stops = own_eos + _numbered_ids(model[0], "eos_token_id")
    return TokenizerSettings(
        bos_id=first("bos"),
        eos_ids=tuple(dict.fromkeys(stops or _numbered_ids(model[1], "eos_token_id"))),
        pad_id=first("pad"),
        chat_template=_template(folder, own[0]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    path: Path
    fields: dict[str, object]


def _object(path: Path) -> _File:
    if not path.is_file():
        return _File(path=path, fields={})
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); fetch the file again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected a JSON object; fetch the file again")
    return _File(path=path, fields=fields)


def _named_ids(data: _File, field: str, id_of: IdOf) -> Iterator[int]:
    value = data.fields.get(field)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{data.path}: {field} = {value!r} is not a token; write its text")
    # a token that the vocabulary lacks can neither be met nor written, so it counts as not set
    token_id = id_of(value)
    if token_id is not None:
        yield token_id


def _numbered_ids(data: _File, field: str) -> list[int]:
    value = data.fields.get(field)
    ids: list[object] = [] if value is None else list(value) if isinstance(value, list) else [value]
    found = [id for id in ids if isinstance(id, int) and not isinstance(id, bool)]
    if len(found) < len(ids) or min(found, default=0) < 0:
        raise ValueError(f"{data.path}: {field} = {value!r} is not an id or a list of ids (whole numbers from 0)")
    return found


def _template(folder: Path, config: _File) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}); fetch the file again") from error
    for data in (config, _object(folder / "chat_template.json")):
        value = data.fields.get("chat_template")
        if isinstance(value, list):
            # several templates under names: the one named default is the one for chatting
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{data.path}: chat_template is a {type(value).__name__}, expected a Jinja text")
        if value:
            return value
    return None
