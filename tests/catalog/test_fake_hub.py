"""The hub on this machine answers as the real one does."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from tests.catalog.fake_hub import FakeHub, serve


def _answer(client: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        received = client.recv(64)
        assert received, "the connection was closed"
        answer += received
    return answer


def test_a_refusal_arrives_whatever_was_sent() -> None:
    body = b"x" * (16 << 20)
    with serve(FakeHub(statuses={"/create": 403})) as hub:
        url = urlsplit(hub.url)
        with socket.create_connection((url.hostname or "", url.port or 0)) as client:
            # A second request over the same connection: the real client asks more after a refusal.
            for _ in range(2):
                client.sendall(b"POST /api/repos/create HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body))
                client.sendall(body)
                assert _answer(client).startswith(b"HTTP/1.1 403")
