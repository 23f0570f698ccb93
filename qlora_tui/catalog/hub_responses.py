"""Responses of the Hub, or of any server in its place, read within bounds.

``huggingface_hub`` reads the whole body of each error and redirection, of any length. Here only requested
bodies are read, up to a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

TIMEOUT_S = 15
"""Seconds for connecting, and for each wait for data."""
_MAX_REDIRECTS = 10
_CHUNK_BYTES = 1 << 16
_USED_HEADERS = ("x-error-code", "x-error-message", "x-request-id", "retry-after")
"""Headers that ``huggingface_hub`` uses to distinguish errors, and that messages here use."""


class TooLong(Exception):
    """A body is longer than its bound."""


@contextmanager
def open_response(
    url: str, headers: Mapping[str, str], params: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Open the response for ``url`` after redirections, its body unread and uncompressed.

    Raises the client's exceptions, and ConnectionError for a response that cannot be read within bounds.
    """
    from huggingface_hub import get_session

    client = get_session()
    request = client.build_request(
        "GET",
        url,
        params=dict(params or {}),
        headers={**headers, "Accept-Encoding": "identity"},
        timeout=TIMEOUT_S,
    )
    for _ in range(_MAX_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            if response.next_request is None:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise ConnectionError("an unrequested compressed response")
                yield response
                return
            request = response.next_request
        finally:
            response.close()
    raise ConnectionError("too many redirections")


def raise_for_status(response: Any) -> None:
    """Raise the client's error for an error status, without reading the body."""
    from huggingface_hub import hf_raise_for_status

    if response.status_code < 400:
        return
    headers = {name: response.headers[name] for name in _USED_HEADERS if name in response.headers}
    hf_raise_for_status(type(response)(response.status_code, headers=headers, request=response.request))


def read_body(response: Any, max_bytes: int) -> bytes:
    """Read the body of a response. Raises TooLong where it is longer than ``max_bytes``."""
    parts, size = [], 0
    for part in response.iter_bytes(_CHUNK_BYTES):
        size += len(part)
        if size > max_bytes:
            raise TooLong(f"more than {max_bytes >> 20} MiB")
        parts.append(part)
    return b"".join(parts)
