"""Errors in the form of OpenAI's API, which its clients turn into exceptions."""

from __future__ import annotations

from typing import Any

from qlora_tui.errors import EXIT_USAGE, UserError

RETRY_AFTER_S = 30
"""Seconds after which a client may ask again while a run has the card."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than 200, in words.

    Raised if a request cannot be answered; the app sends it, or ends a stream with it.
    """

    def __init__(
        self, status: int, message: str, *, param: str = "", code: str = "", retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        """Parameter that it is about."""
        self.code = code
        """Kind of the error, as ``model_not_found``."""
        self.retry_after_s = retry_after_s
        """Seconds after which asking again makes sense; 0 if it does not."""

    def body(self) -> dict[str, Any]:
        """Return the object that is sent."""
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
        """Headers of the HTTP response."""
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


def unsupported(param: str, what: str) -> ApiError:
    """Return the error for a parameter that would change the answer, and cannot be followed."""
    return ApiError(400, what, param=param, code="unsupported_parameter")


def of_user_error(problem: UserError, *, is_lost: bool) -> ApiError:
    """Return what a client is told of an error of the engine; ``is_lost``: the engine has ended."""
    message = " ".join(str(problem).split())
    if is_lost:
        return ApiError(503, message, code="engine_ended", retry_after_s=RETRY_AFTER_S)
    status = 400 if problem.exit_code == EXIT_USAGE else 500
    return ApiError(status, message, code=problem.code.replace("-", "_"))
