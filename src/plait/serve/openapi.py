"""The description of all routes, made from the same dataclasses that read their requests."""

from plait.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from plait.serve.responses import ResponsesBody
from plait.serve.schema import schema

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUS = {"type": "object", "required": ["status"], "properties": {"status": _TEXT}}


def _object(**properties: object) -> dict[str, object]:
    return {"type": "object", "required": list(properties), "properties": properties}


_ANSWER = _object(
    id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, choices={"type": "array"}, usage={"type": "object"}
)
_RESPONSE = _object(id=_TEXT, object=_TEXT, created_at=_COUNT, model=_TEXT, status=_TEXT, output={"type": "array"})
_MODEL = _object(id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT)
_TOKENS = _object(tokens={"type": "array", "items": _COUNT}, count=_COUNT, max_model_len=_COUNT)

# path -> (summary, body, answer, whether it may be a stream)
_POSTS: dict[str, tuple[str, type, dict[str, object], bool]] = {
    "/v1/chat/completions": ("Answer a conversation", ChatBody, _ANSWER, True),
    "/v1/completions": ("Continue texts", CompletionBody, _ANSWER, True),
    "/v1/responses": ("Answer, in the newer form", ResponsesBody, _RESPONSE, True),
    "/tokenize": ("Text to token ids", TokenizeBody, _TOKENS, False),
    "/detokenize": ("Token ids to text", DetokenizeBody, _object(prompt=_TEXT), False),
}
# path -> (summary, answer, whether a key is needed, other statuses)
_GETS: dict[str, tuple[str, dict[str, object], bool, tuple[int, ...]]] = {
    "/v1/models": (
        "The model that is served",
        _object(object=_TEXT, data={"type": "array", "items": _MODEL}),
        True,
        (503,),
    ),
    "/v1/models/{model}": ("The same by its name", _MODEL, True, (404, 503)),
    "/health": ("Whether the process lives", _STATUS, False, (500,)),
    "/ready": ("Whether requests are taken", _STATUS, False, (503,)),
}
_REFUSALS = {
    400: "a field is wrong; error.param names it",
    401: "the API key is missing or unknown",
    404: "there is no such model",
    408: "the body came too slowly",
    413: "the body is too long",
    415: "the body is not application/json",
    429: "all places are taken; Retry-After says when to come again",
    500: "a fault of the server",
    503: "loading, draining, or failed",
    504: "the answer took too long",
}


def describe(version: str, needs_key: bool = False) -> dict[str, object]:
    """The OpenAPI document.

    Args:
        version: of Plait.
        needs_key: whether this server asks for an API key.
    """
    found: dict[str, object] = {"Error": _ERROR}
    paths: dict[str, object] = {}
    for path, (summary, body, answer, streams) in _POSTS.items():
        kinds: dict[str, object] = {"application/json": {"schema": answer}}
        if streams:
            kinds["text/event-stream"] = {"schema": _TEXT}
        post = {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema(body, found)}}},
            "responses": {"200": {"description": "the answer", "content": kinds}} | _refused(*_REFUSALS),
        }
        paths[path] = {"post": post}
    for path, (summary, answer, is_guarded, others) in _GETS.items():
        statuses = (*others, 400, 401) if is_guarded else (*others, 400)
        get: dict[str, object] = {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
            "responses": {"200": {"description": "the answer", "content": {"application/json": {"schema": answer}}}}
            | {
                str(status): {
                    "description": _REFUSALS[status],
                    "content": {"application/json": {"schema": {}}},
                }
                for status in statuses
            },
        }
        if "{" in path:
            get["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": _TEXT}]
        if not is_guarded:
            get["security"] = []
        paths[path] = {"get": get}
    paths["/metrics"] = {
        "get": {
            "summary": "Figures for Prometheus",
            "operationId": "metrics",
            "responses": {"200": {"description": "figures", "content": {"text/plain": {"schema": _TEXT}}}}
            | _refused(400, 401),
        }
    }
    schemes = {"key": {"type": "http", "scheme": "bearer"}} if needs_key else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Plait", "version": version, "description": "OpenAI's routes over one engine."},
        "paths": paths,
        "security": [{name: []} for name in schemes],
        "components": {"schemas": found, "securitySchemes": schemes},
    }


def _refused(*statuses: int) -> dict[str, object]:
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _REFUSALS[status], "content": body} for status in statuses}
