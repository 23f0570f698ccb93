"""Errors in the format of OpenAI's API, which clients convert to exceptions."""

from __future__ import annotations

from typing import Any

from qlora_tui.errors import EXIT_USAGE, UserError

RETRY_AFTER_S = 30
"""Seconds after which a client may retry while a run uses the GPU."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error response, with the message and HTTP status to send.

    Raised when a request cannot be answered. The app sends the error as the response, or as the last event of
    a stream.
    """

    def __init__(
        self, status: int, message: str, *, param: str = "", code: str = "", retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        """Name of the request parameter that the error is about."""
        self.code = code
        """Code of the error, such as ``model_not_found``."""
        self.retry_after_s = retry_after_s
        """Seconds after which a retry makes sense; 0 if it never does."""

    def body(self) -> dict[str, Any]:
        """Return the JSON object to send."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param or None,
            "code": self.code or None,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Return the additional headers of the HTTP response."""
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


def unsupported(param: str, what: str) -> ApiError:
    """Return the error for a parameter that would change the answer but is not supported."""
    return ApiError(400, what, param=param, code="unsupported_parameter")


def of_user_error(problem: UserError, *, is_lost: bool) -> ApiError:
    """Return the error response for an error of the engine. ``is_lost``: the engine process has ended."""
    message = " ".join(str(problem).split())
    if is_lost:
        return ApiError(503, message, code="engine_ended", retry_after_s=RETRY_AFTER_S)
    status = 400 if problem.exit_code == EXIT_USAGE else 500
    return ApiError(status, message, code=problem.code.replace("-", "_"))
