"""Responses of the Hub, or of any server in its place, read within bounds.

``huggingface_hub`` reads the whole body of each error and redirection, of any length. Here only requested
bodies are read, up to a bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from queue import Empty, Queue
from typing import Any, TypeVar

TIMEOUT_S = 15
"""Seconds for connecting, and for each wait for data."""
_HEADERS_S = 60.0
"""Seconds for a response to begin, however often a piece of its headers arrives."""
_WINDOW_S = 30.0
_LEAST_BYTES = 30 << 10
"""A server that sends less than this in a window of time is given up: at a byte a second nothing ends."""
_MAX_REDIRECTS = 10
T = TypeVar("T")
_USED_HEADERS = ("x-error-code", "x-error-message", "x-request-id", "retry-after")
"""Headers that ``huggingface_hub`` uses to distinguish errors, and that messages here use."""


class TooLong(Exception):
    """A body is longer than its bound."""


class TooSlow(ConnectionError):
    """A response begins or goes on so slowly that it would not end."""


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
        response = _within(_HEADERS_S, partial(client.send, request, stream=True, follow_redirects=False))
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


def pieces(response: Any) -> Iterator[bytes]:
    """Yield the body of a response as it arrives. Raises TooSlow."""
    began, size = time.monotonic(), 0
    for part in response.iter_bytes():
        yield part
        size += len(part)
        now = time.monotonic()
        if now - began < _WINDOW_S:
            continue
        if size < _LEAST_BYTES:
            raise TooSlow(f"only {size:,} bytes in {now - began:.0f} seconds")
        began, size = now, 0


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns, in another thread. Raises TooSlow where it takes longer."""
    done: Queue[tuple[T | None, BaseException | None]] = Queue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="request", daemon=True).start()
    try:
        answer, error = done.get(timeout=seconds)
    except Empty:
        raise TooSlow(f"no response in {seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # without an error there is an answer


def read_body(response: Any, max_bytes: int) -> bytes:
    """Read the body of a response. Raises TooLong where it is longer than ``max_bytes``."""
    parts, size = [], 0
    for part in pieces(response):
        size += len(part)
        if size > max_bytes:
            raise TooLong(f"more than {max_bytes >> 20} MiB")
        parts.append(part)
    return b"".join(parts)
