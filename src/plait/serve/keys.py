"""API keys: who may ask."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from plait.serve.error import RequestError


class Keys:
    """A set of keys, kept as hashes; an empty set lets everybody in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """
        Args:
            keys: the keys.

        Raises: ValueError for one that is empty, not ASCII or holds white space.
        """
        plain = list(keys)
        for i, key in enumerate(plain):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"API key {i + 1} is empty or has characters that no header can carry; choose another")
        self._hashes = tuple(hashlib.sha256(key.encode()).digest() for key in plain)

    @classmethod
    def open(cls, key: str | None, file: Path | None) -> "Keys":
        """A key, or a file with one a line (# begins a comment), or both, or none.

        Raises: ValueError for a file without keys; OSError.
        """
        keys = [] if key is None else [key]
        if file is not None:
            lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
            found = [line for line in lines if line]
            if not found:
                raise ValueError(f"{file} holds no key; write one a line")
            keys += found
        return cls(keys)

    @property
    def are_needed(self) -> bool:
        """Whether anybody is kept out."""
        return bool(self._hashes)

    def check(self, authorization: str | None) -> None:
        """Let a request pass by its Authorization header.

        Raises: RequestError 401.
        """
        if not self._hashes:
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        # hashes of equal length, and no early end: time tells nothing
        known = [hmac.compare_digest(given, each) for each in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            said = "is not known" if authorization else "is missing"
            raise RequestError(
                f"the API key {said}; send it as Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
