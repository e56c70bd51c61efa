"""The application: which path leads to whom."""

from collections.abc import Collection, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp

from plait.serve import session_routes
from plait.serve.ask import ask_chat, ask_completion
from plait.serve.chat import ChatForm
from plait.serve.completion import CompletionForm
from plait.serve.desk import Desk
from plait.serve.door import Door
from plait.serve.frame import Frame
from plait.serve.openapi import describe
from plait.serve.protocol import ChatBody, CompletionBody
from plait.serve.responses import ResponseForm, ResponsesBody, ask_response
from plait.serve.served import House

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def application(
    house: House,
    version: str,
    *,
    hosts: Collection[str] = (),
    origins: Sequence[str] = (),
    more: Sequence[BaseRoute] = (),
) -> ASGIApp:
    """Build the whole of it.

    Args:
        house: limits, keys, and the model once it is there.
        version: of Plait.
        hosts: names in the Host header that are answered; empty answers all.
        origins: web pages of other origins that may ask; none by default.
        more: further routes.

    Returns: what a server runs.
    """
    desk = Desk(house, lambda: describe(version, house.keys.are_needed))
    routes: list[BaseRoute] = [
        Route("/", _page, methods=["GET"]),
        Route("/v1/chat/completions", Door(house, ChatBody, ask_chat, ChatForm), methods=["POST"]),
        Route("/v1/completions", Door(house, CompletionBody, ask_completion, CompletionForm), methods=["POST"]),
        Route("/v1/responses", Door(house, ResponsesBody, ask_response, ResponseForm), methods=["POST"]),
        Route("/v1/models", desk.models, methods=["GET"]),
        Route("/v1/models/{model:path}", desk.models, methods=["GET"]),
        Route("/tokenize", desk.tokenize, methods=["POST"]),
        Route("/detokenize", desk.detokenize, methods=["POST"]),
        Route("/health", desk.health, methods=["GET"]),
        Route("/ready", desk.ready, methods=["GET"]),
        Route("/metrics", desk.metrics, methods=["GET"]),
        Route("/openapi.json", desk.openapi, methods=["GET"]),
        *session_routes.routes(house),
        *more,
    ]
    paths = [route.path for route in routes if isinstance(route, Route)]
    return Frame(opened(Router(routes, redirect_slashes=False), origins), house, hosts, paths)


def opened(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let web pages of some other origins ask; of none, by default."""
    if not origins:
        return app
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(app, allow_origins=origins, allow_methods=methods, allow_headers=["*"], max_age=600)


async def _page(request: Request) -> Response:
    from plait.serve.page.assemble import page

    found = page()
    return Response(found.body, headers=found.headers)
