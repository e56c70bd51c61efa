"""A request that cannot be served, as the error that OpenAI's clients understand.

{"error": {"message": ..., "type": ..., "param": FIELD or null, "code": ... or null}}
"""

import json

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class RequestError(ValueError):
    """Why a request is not served."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """
        Args:
            message: what was given, and what would be right.
            param: the field, dotted: "messages[0].role".
            status: HTTP's number.
            code: OpenAI's word for the case, where it has one.
            retry_after: seconds after which the same request may succeed.
        """
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.retry_after = message, param, status, code, retry_after

    def to_dict(self) -> dict[str, object]:
        """The body of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        """The same as bytes. Broken surrogates of the request survive as escapes."""
        return json.dumps(self.to_dict()).encode()

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP wants to be told besides."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})
