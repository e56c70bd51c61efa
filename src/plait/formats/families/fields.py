"""Reads the fields of a config.json one by one, so that nothing that matters is missed, mistyped or misspelled."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from plait.formats.error import CheckpointError

T = TypeVar("T")

# no size of a model comes near; a broken file's may
_LARGEST = 1 << 40
_MOST_LAYERS = 10_000


class Fields:
    """A JSON object whose fields are asked for by name, or by several names that mean the same.

    It remembers what was asked, so that `check_spelling` can find a key that looks like one that was asked in vain.
    """

    def __init__(self, data: Mapping[str, object], path: Path) -> None:
        self.data, self.path = data, path
        self._asked: dict[str, bool] = {}  # name -> whether it, or another name for the same, was there
        self._known: set[str] = set()

    def know(self, *names: str) -> None:
        """These fields are right ones, though nobody may ask for them in this file."""
        self._known.update(names)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.value(name) is not None

    def value(self, *names: str) -> object:
        """The first of these fields that is there and not null, as JSON gave it; None otherwise."""
        found = [name for name in names if name in self.data]
        for name in names:
            self._asked[name] = self._asked.get(name, False) or bool(found)
        return next((self.data[name] for name in found if self.data[name] is not None), None)

    def whole(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; missing or null is the default, or an error without one."""
        value = self._value(names, default)
        if type(value) is not int or not least <= value <= _LARGEST:
            raise self.wrong(names[0], value, f"a whole number of at least {least}")
        return value

    def layers(self, name: str) -> int:
        """How many layers there are."""
        value = self.whole(name)
        if value > _MOST_LAYERS:
            raise self.wrong(name, value, f"at most {_MOST_LAYERS}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A number."""
        value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(names[0], value, "a number")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """True or false."""
        value = self._value(names, default)
        if not isinstance(value, bool):
            raise self.wrong(names[0], value, "true or false")
        return value

    def only(self, name: str, *allowed: object, why: str) -> None:
        """Refuse a setting that would change what the model computes; absent and null are fine."""
        value = self.value(name)
        if value is not None and value not in allowed:
            shown = " or ".join(repr(item) for item in allowed) or "nothing"
            raise CheckpointError(f"{self.path}: {name} = {value!r} is not supported ({why}); known: {shown}")

    def tokens(self, *names: str) -> tuple[int, ...]:
        """Token ids: one, a list, or none."""
        value = self.value(*names)
        listed: list[object] = [] if value is None else list(value) if isinstance(value, list) else [value]
        found = [item for item in listed if isinstance(item, int) and not isinstance(item, bool)]
        if len(found) < len(listed):
            raise self.wrong(names[0], value, "a token id or a list of them")
        # some configs say -1 for "none"
        return tuple(item for item in found if item >= 0)

    def token(self, name: str) -> int | None:
        """One token id, or None."""
        found = self.tokens(name)
        return found[0] if found else None

    def table(self, name: str) -> "Fields | None":
        """A nested object, or None."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value, "a table")
        return None if value is None else Fields(value, self.path)

    def wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        """The error for a field of the wrong kind."""
        if value is None:
            return CheckpointError(f"{self.path}: {name} is missing; expected {expected}{self._near(name)}")
        return CheckpointError(f"{self.path}: {name} = {value!r}, expected {expected}")

    def check_spelling(self) -> None:
        """Refuse a key that nobody asked for and that differs by a letter or two from one that is missing."""
        absent = [name for name, there in self._asked.items() if not there]
        pairs = [
            (difflib.SequenceMatcher(None, key, name).ratio(), key, name) for key in self._strange() for name in absent
        ]
        likeness, key, name = max(pairs, default=(0.0, "", ""))
        if likeness >= 0.88:
            raise CheckpointError(f"{self.path}: unknown key {key!r}; did you mean {name!r}?")

    def _strange(self) -> list[str]:
        return [key for key in self.data if key not in self._asked and key not in self._known]

    def _value(self, names: tuple[str, ...], default: T) -> object | T:
        value = self.value(*names)
        return default if value is None else value

    def _near(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._strange(), n=1, cutoff=0.8)
        return f"; is {close[0]!r} meant to be it?" if close else ""
