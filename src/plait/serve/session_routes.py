"""The routes of the sessions that a server keeps.

    POST   /v1/sessions          begin one, with messages or without
    GET    /v1/sessions          which there are, the last used first
    GET    /v1/sessions/{id}     one, with what was said
    DELETE /v1/sessions/{id}     forget it

A session goes on by `"session": id` in /v1/chat/completions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from plait.serve import ask
from plait.serve.limits import read_body
from plait.serve.protocol import Message
from plait.serve.schema import Limit, parse, read
from plait.serve.served import House
from plait.serve.sessions import Sessions

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBody:
    """POST /v1/sessions."""

    messages: Annotated[tuple[Message, ...], Limit(most=4096, help="what opens it, such as a system text")] = ()
    model: Annotated[str, Limit(most=512)] | None = None


def routes(house: House) -> list[Route]:
    """The routes over the sessions of whatever model the house serves."""
    desk = SessionDesk(house)
    return [
        Route("/v1/sessions", desk.create, methods=["POST"]),
        Route("/v1/sessions", desk.listed, methods=["GET"]),
        Route("/v1/sessions/{id}", desk.describe, methods=["GET"]),
        Route("/v1/sessions/{id}", desk.delete, methods=["DELETE"]),
    ]


class SessionDesk:
    """Answers them; what reads or writes files runs beside the event loop."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def create(self, request: Request) -> Response:
        """POST /v1/sessions."""
        served = self._house.served
        sessions = served.kept_sessions()

        def work(raw: bytes) -> dict[str, object]:
            body = read(SessionBody, parse(raw or b"{}"))
            served.check_name(body.model)
            return sessions.create([ask.plain(message, served) for message in body.messages])

        # a place before the body: bodies that are still coming take memory too
        with self._house.desk.enter():
            raw = await read_body(request, self._house.limits)
            return JSONResponse(await self._house.by_hand(work, raw), 201)

    async def listed(self, request: Request) -> Response:
        """GET /v1/sessions."""
        return JSONResponse({"object": "list", "data": await self._do(Sessions.listed), "has_more": False})

    async def describe(self, request: Request) -> Response:
        """GET /v1/sessions/{id}."""
        session_id = request.path_params["id"]
        return JSONResponse(await self._do(lambda sessions: sessions.describe(session_id)))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/sessions/{id}."""
        session_id = request.path_params["id"]
        await self._do(lambda sessions: sessions.delete(session_id))
        return JSONResponse({"id": session_id, "object": "session.deleted", "deleted": True})

    async def _do(self, work: Callable[[Sessions], R]) -> R:
        sessions = self._house.served.kept_sessions()
        with self._house.desk.enter():
            return await self._house.by_hand(work, sessions)
