"""The hub on this machine answers as the real one does."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from tests.catalog.fake_hub import FakeHub, serve


def test_a_refusal_arrives_whatever_was_sent() -> None:
    body = b"x" * (16 << 20)
    with serve(FakeHub(statuses={"/create": 403})) as hub:
        url = urlsplit(hub.url)
        with socket.create_connection((url.hostname or "", url.port or 0)) as client:
            client.sendall(b"POST /api/repos/create HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body))
            client.sendall(body)
            assert client.recv(64).startswith(b"HTTP/1.1 403")
