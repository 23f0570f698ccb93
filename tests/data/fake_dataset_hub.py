"""A small server with the dataset part of a hub, for the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "a" * 40


@contextmanager
def dataset_hub(files: dict[str, bytes], gated: bool = False) -> Iterator[str]:
    """Serve one dataset, whatever its id; yield the address for ``HF_ENDPOINT``."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if gated and "/datasets/" in path:
                self._answer(
                    403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
                )
            elif "/tree/" in path:
                listed = [
                    {"type": "file", "path": n, "size": len(b), "oid": "b" * 40} for n, b in files.items()
                ]
                self._answer(200, json.dumps(listed).encode())
            elif path.startswith("/api/datasets/"):
                siblings = [{"rfilename": n} for n in files]
                about = {
                    "id": "owner/set",
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "siblings": siblings,
                }
                self._answer(200, json.dumps(about).encode())
            elif "/resolve/" in path and name in files:
                self._answer(200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
            else:
                self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
