"""Arguments of calls that a model writes as JSON, given out while they are still being written.

    {"name": "weather", "arguments": {"city": "Zür      the name is known; so far the arguments are {"city": "Zür

Only calls whose name comes first, and at once before their arguments, can be told before they have ended. What comes
out is the model's own text, every character looked at once.
"""

import json
import re
from collections.abc import Collection

_LONGEST_HEAD = 512


class Arguments:
    """Follows one call, a list of calls, or several with anything between them."""

    def __init__(self, names: Collection[str], field: str) -> None:
        """Args: names: of functions that may be called. field: what else arguments may be called."""
        self._names = names
        text = r'"(?:[^"\\]|\\.)*"'
        self._begins = re.compile(rf'\{{\s*"name"\s*:\s*({text})\s*,\s*"(?:arguments|{field})"\s*:\s*\{{', re.DOTALL)
        self.n = 0
        """Calls begun."""
        self._head = self._name = ""
        self._depth = self._base = 0
        self._quotes = self._escapes = self._writes = self._is_over = False

    def add(self, text: str) -> list[tuple[str, str]]:
        """Take the next piece; return ("name", "") where a call begins, and ("", "more") of the arguments of the last.

        Nothing comes any more once something else has come than a call that can be told so early.
        """
        found: list[tuple[str, str]] = []
        first = 0
        for at, c in enumerate(text):
            if self._is_over:
                break
            deeper = self._move(c)
            if self._writes and deeper < 0 and self._depth == self._base:
                self._writes, self._head = False, ""
                found.append(("", text[first : at + 1]))
            elif not self._writes and self._begun(c, deeper):
                found.append((self._name, ""))
                first = at
        if self._writes and text:
            found.append(("", text[first:]))
        return found

    def _move(self, c: str) -> int:
        """Whether a character opens (1) or closes (-1) a bracket that is not quoted."""
        deeper = 0
        if self._escapes:
            self._escapes = False
        elif self._quotes:
            self._escapes, self._quotes = c == "\\", c != '"'
        elif c == '"':
            self._quotes = True
        elif c in "{[":
            deeper = 1
        elif c in "}]":
            deeper = -1
        self._depth += deeper
        if deeper and not self._base:
            # calls stand in a list, or are no list
            self._base = 2 if c == "[" else 1
        return deeper

    def _begun(self, c: str, deeper: int) -> bool:
        """Whether a character is the first of a call's arguments."""
        if deeper > 0 and self._depth == self._base:
            self._head = c
            return False
        self._head += c
        # a whole call that could not be told early: what follows it must not come before it
        self._is_over |= deeper < 0 and self._depth < self._base and self._head.startswith("{")
        if deeper > 0 and self._depth > self._base:
            head = self._begins.fullmatch(self._head)
            self._name = "" if head is None else _text(head[1])
            self._writes = self._name in self._names
            self._is_over = not self._writes
            self.n += self._writes
        self._is_over |= not self._writes and len(self._head) > _LONGEST_HEAD
        return self._writes


def _text(quoted: str) -> str:
    try:
        return json.loads(quoted)
    except ValueError:
        return ""
