"""Which replica takes a request: the one that has seen its beginning, unless another is much less busy.

A replica keeps the states of prompts that it has read. A conversation grows turn by turn and a system text opens many
prompts, so each request is cut into pieces (messages, or stretches of text) and every prefix of these has a hash; the
longest one that was met before says who may spare reading it again.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from plait.serve.error import RequestError
from plait.serve.schema import parse

_CHARACTERS, _IDS = 2048, 512
_MOST_PIECES = 64
_KEPT = 1 << 16
_SLACK = 4
"""A replica that knows the beginning may have this many more requests open than the least busy one."""


def prefixes(body: bytes) -> list[bytes]:
    """Hashes of a request's beginnings, the shortest first; none for a body that no replica will take."""
    try:
        data = parse(body) if body else None
    except RequestError:
        return []
    if not isinstance(data, dict):
        return []
    if isinstance(data.get("session"), str):
        return [_hash(b"session", data["session"].encode("utf-8", "replace"))]
    told = data.get("messages", data.get("input", data.get("prompt")))
    found: list[bytes] = []
    last = b""
    for piece in _pieces(told):
        last = _hash(last, piece)
        found.append(last)
        if len(found) == _MOST_PIECES:
            break
    return found


class Memory:
    """Who has seen which beginnings, as far as they are remembered."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, found: Sequence[bytes], busy: dict[int, int]) -> int:
        """Pick a replica and remember it for these beginnings.

        Args:
            found: of the request, the shortest first.
            busy: of each replica that may take it, how many requests it has open.

        Raises: ValueError if there is none.
        """
        least = min(busy, key=lambda i: (busy[i], i))
        known = next((self._seen[h] for h in reversed(found) if h in self._seen), None)
        chosen = known if known is not None and known in busy and busy[known] <= busy[least] + _SLACK else least
        for each in found:
            self._seen[each] = chosen
            self._seen.move_to_end(each)
        while len(self._seen) > _KEPT:
            self._seen.popitem(last=False)
        return chosen

    def forget(self, replica: int) -> None:
        """A replica has begun anew and knows nothing."""
        for each in [each for each, seen in self._seen.items() if seen == replica]:
            del self._seen[each]


def _pieces(told: object) -> Iterator[bytes]:
    if isinstance(told, str):
        yield from (told[i : i + _CHARACTERS].encode("utf-8", "replace") for i in range(0, len(told), _CHARACTERS))
    elif isinstance(told, list) and told and isinstance(told[0], int):
        yield from _texts(told[i : i + _IDS] for i in range(0, len(told), _IDS))
    elif isinstance(told, list):
        yield from _texts(told)


def _texts(parts: Iterable[object]) -> Iterator[bytes]:
    for part in parts:
        yield json.dumps(part, sort_keys=True).encode()


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()
