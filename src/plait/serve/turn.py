"""A turn of a kept session: what was said before stands in front, what is said now is saved with it."""

from collections.abc import Mapping, Sequence

from plait.engine.session import Session
from plait.serve.sessions import Sessions


class Turn:
    """One request's hold of a session. Whoever makes it must `end` or `leave` it."""

    def __init__(self, sessions: Sessions, session_id: str, new: Sequence[Mapping[str, object]]) -> None:
        """Takes the session; reads its file.

        Args:
            sessions: where it is kept.
            session_id: which.
            new: the messages of this request.

        Raises: RequestError as Sessions.begin.
        """
        self._sessions, self._id = sessions, session_id
        self.session: Session = sessions.begin(session_id)
        self.messages: list[Mapping[str, object]] = [*self.session.messages, *new]

    async def end(self, session: Session | None, answer: Mapping[str, object]) -> None:
        """Save what was said, and what the engine has seen of it."""
        await self._sessions.end(self._id, session, [dict(message) for message in (*self.messages, answer)])

    def leave(self) -> None:
        """Let go of it, as it was saved last; nothing after `end`."""
        self._sessions.leave(self._id)
