"""Small questions: which model, alive, ready, figures, ids of a text, text of ids, and what routes there are."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from plait.serve.ask import message_ids, plain
from plait.serve.error import RequestError
from plait.serve.limits import read_body
from plait.serve.metrics import CONTENT_TYPE
from plait.serve.protocol import DetokenizeBody, TokenizeBody
from plait.serve.schema import parse, read
from plait.serve.served import House, Phase, Served


class Desk:
    """Answers them."""

    def __init__(self, house: House, describe: Callable[[], dict[str, object]]) -> None:
        """
        Args:
            house: where it is.
            describe: makes the OpenAPI document.
        """
        self._house, self._describe = house, describe

    async def models(self, request: Request) -> Response:
        """GET /v1/models, and one of them by its name."""
        served = self._house.served
        entry = {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "plait",
            "max_model_len": served.context,
            "plait": dict(served.facts),
        }
        if "model" in request.path_params:
            served.check_name(request.path_params["model"])
            return JSONResponse(entry)
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, request: Request) -> Response:
        """GET /health: the process lives and its engine has not failed; loading and draining are healthy."""
        phase = self._house.phase
        return JSONResponse({"status": str(phase)}, 500 if phase is Phase.FAILED else 200)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 only while requests are taken."""
        phase = self._house.phase
        return JSONResponse({"status": str(phase)}, 200 if phase is Phase.READY else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._house.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(self._describe())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        return await self._answer(request, _tokenize)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        return await self._answer(request, _detokenize)

    async def _answer(self, request: Request, work: Callable[[bytes, Served], dict[str, object]]) -> Response:
        house = self._house
        served = house.served
        with house.desk.enter():
            raw = await read_body(request, house.limits)
            return JSONResponse(await house.by_hand(work, raw, served))


def _tokenize(raw: bytes, served: Served) -> dict[str, object]:
    body = read(TokenizeBody, parse(raw))
    served.check_name(body.model)
    if body.messages is not None:
        ids = message_ids(
            [plain(message, served) for message in body.messages],
            served,
            add_generation_prompt=body.add_generation_prompt,
        )
    else:
        try:
            ids = served.tokenizer.encode(body.prompt or "", add_special=body.add_special_tokens)
        except ValueError as error:
            raise RequestError(str(error), "prompt") from None
    found: dict[str, object] = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
    if body.return_token_strs:
        found["token_strs"] = [served.tokenizer.token_of(token_id) for token_id in ids]
    return found


def _detokenize(raw: bytes, served: Served) -> dict[str, object]:
    body = read(DetokenizeBody, parse(raw))
    served.check_name(body.model)
    try:
        return {"prompt": served.tokenizer.decode(body.tokens, skip_special=False)}
    except ValueError as error:
        raise RequestError(str(error), "tokens") from None
