"""Conversations that the server keeps: a file each, so that they go on after a restart where they were, to the bit.

A request with `session` brings only what is new: the saved messages stand before it, the saved cache spares reading
them again, and the answer is saved before the request ends. A turn counts as a whole: what fails, or is left by its
reader, leaves the file as it was. Files appear whole or not at all, so that a server that is killed loses at most the
turns that were running.
"""

import asyncio
import logging
import os
import re
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from plait.engine.engine import Engine
from plait.engine.session import Message, Session
from plait.serve.error import RequestError

try:
    import fcntl
except ImportError:
    # without such locks only this process is kept from using a session twice
    fcntl = None

log = logging.getLogger(__name__)

_ID = re.compile(r"sess_[0-9a-f]{32}")
_ASIDE = re.compile(r"\.sess_[0-9a-f]{32}\.session\.(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """count: sessions in all. total_bytes: of their files; beyond it nothing is begun, saved or gone on with."""

    count: int = 1000
    total_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        for name in ("count", "total_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


class Sessions:
    """The sessions of one folder, for one model. Methods may be called from any thread."""

    def __init__(self, folder: Path, engine: Engine, limits: SessionLimits | None = None) -> None:
        """
        Args:
            folder: made if it is not there; several processes may share it.
            engine: whose model the caches belong to.
            limits: of the folder.

        Raises: OSError if the folder cannot be made.
        """
        self._folder, self._model, self._limits = folder, engine.model, limits or SessionLimits()
        folder.mkdir(parents=True, exist_ok=True)
        self._guard = threading.Lock()
        self._used: dict[str, IO[bytes]] = {}
        self._saved: set[str] = set()
        self._sweep()

    def create(self, messages: Sequence[Message] = ()) -> dict[str, object]:
        """Begin a session.

        Args:
            messages: what opens it, such as a system text.

        Returns: its facts.
        Raises: RequestError 429 if there are too many.
        """
        self._require_room()
        n = len(self._files())
        if n >= self._limits.count:
            raise RequestError(f"there are {n} sessions, as many as are kept; delete one of them", status=429)
        session_id = f"sess_{secrets.token_hex(16)}"
        Session(messages).save(self._path(session_id), self._model)
        return self.describe(session_id)

    def describe(self, session_id: str) -> dict[str, object]:
        """What is known of a session, with its messages.

        Raises: RequestError 404, or 409 if it cannot be used with this model.
        """
        session = self._load(session_id)
        size = session.size()
        return self._facts(session_id) | {
            "tokens": len(session.ids),
            "cache": {"state_bytes": size.state_bytes, "kv_bytes": size.kv_bytes},
            "messages": session.messages,
        }

    def listed(self) -> list[dict[str, object]]:
        """All sessions, the last used first, without their messages."""
        found = []
        for path in self._files():
            try:
                found.append((path.stat().st_mtime_ns, self._facts(path.stem)))
            except (FileNotFoundError, RequestError):
                # deleted since the folder was read
                continue
        return [facts for _, facts in sorted(found, key=lambda one: one[0], reverse=True)]

    def delete(self, session_id: str) -> None:
        """Forget a session.

        Raises: RequestError 404, or 409 while it is in use.
        """
        self._take(session_id)
        try:
            self._path(session_id).unlink(missing_ok=True)
            self._lock_path(session_id).unlink(missing_ok=True)
        finally:
            self.leave(session_id)

    def begin(self, session_id: str) -> Session:
        """Take a session for one request; nobody else can until `end` or `leave`.

        Raises: RequestError 404 if there is none, 409 if it is in use or belongs to another model, 429 if the folder
            is full.
        """
        self._require_room()
        self._take(session_id)
        try:
            return self._load(session_id)
        except BaseException:
            self.leave(session_id)
            raise

    async def end(self, session_id: str, session: Session | None, messages: Sequence[Message]) -> None:
        """Save a session after an answer, and give it back.

        Args:
            session_id: which `begin` took.
            session: what the engine left in the handle of the request; without it all is read again next time.
            messages: the whole conversation, the answer included.
        """
        with self._guard:
            self._saved.add(session_id)
        # a reader who leaves before the thread begins must not give away what it is about to write
        await asyncio.shield(asyncio.to_thread(self.save, session_id, session, messages))

    def save(self, session_id: str, session: Session | None, messages: Sequence[Message]) -> None:
        """The same, waiting for the disk."""
        kept = session or Session()
        kept.messages = list(messages)
        with self._guard:
            self._saved.add(session_id)
        try:
            kept.save(self._path(session_id), self._model)
        finally:
            with self._guard:
                self._saved.discard(session_id)
            self.leave(session_id)

    def leave(self, session_id: str) -> None:
        """Give a session back as it was saved last; does nothing if it was given back already."""
        with self._guard:
            # a reader may leave while the disk is busy; then it is given back by who saves
            held = None if session_id in self._saved else self._used.pop(session_id, None)
        if held is not None:
            # closing it lets go of the lock
            held.close()

    def _take(self, session_id: str) -> None:
        busy = RequestError(f"session {session_id[:64]!r} answers another request", "session", status=409)
        if not self._path(session_id).is_file():
            raise _unknown(session_id)
        with self._guard:
            if session_id in self._used:
                raise busy
            held = self._lock_path(session_id).open("ab")
            try:
                if fcntl is not None:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.close()
                raise busy from None
            except OSError as error:
                log.warning("sessions cannot be locked on this disk (%s); let one process use them", error.strerror)
            self._used[session_id] = held
        if not self._path(session_id).is_file():
            # another process deleted it in between
            self.leave(session_id)
            raise _unknown(session_id)

    def _load(self, session_id: str) -> Session:
        path = self._path(session_id)
        try:
            return Session.load(path, self._model)
        except FileNotFoundError:
            raise _unknown(session_id) from None
        except ValueError as error:
            # where files lie is nobody's business
            words = str(error).replace(str(path), f"session {session_id}")
            raise RequestError(words, "session", status=409) from None

    def _facts(self, session_id: str) -> dict[str, object]:
        try:
            found = self._path(session_id).stat()
        except FileNotFoundError:
            raise _unknown(session_id) from None
        return {"id": session_id, "object": "session", "updated_at": int(found.st_mtime), "bytes": found.st_size}

    def _require_room(self) -> None:
        n_bytes = 0
        for facts in self.listed():
            assert isinstance(facts["bytes"], int)
            n_bytes += facts["bytes"]
        if n_bytes >= self._limits.total_bytes:
            raise RequestError(
                f"the sessions hold {n_bytes} bytes, allowed are {self._limits.total_bytes}; delete some", status=429
            )

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("sess_*.session") if _ID.fullmatch(path.stem)]

    def _path(self, session_id: str) -> Path:
        # the only way from a request to the disk: nothing but our own ids passes
        if not _ID.fullmatch(session_id):
            raise _unknown(session_id)
        return self._folder / f"{session_id}.session"

    def _lock_path(self, session_id: str) -> Path:
        return self._folder / f".{session_id}.lock"

    def _sweep(self) -> None:
        """Remove what killed processes left: halves of files, and locks of sessions that are gone."""
        for path in self._folder.glob(".sess_*"):
            half = _ASIDE.fullmatch(path.name)
            is_lost = path.suffix == ".lock" and not (self._folder / f"{path.stem[1:]}.session").exists()
            if is_lost or (half and not _is_alive(int(half[1]))):
                path.unlink(missing_ok=True)


def _unknown(session_id: str) -> RequestError:
    return RequestError(f"there is no session {session_id[:64]!r}", "session", status=404)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # somebody else's process
        return True
    return True
