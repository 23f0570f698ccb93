"""A model hub on this machine for the real client: search, pages, files with ranges, uploads, gated models,
failures.

Two origins, as on the real one: the hub itself, and the store it redirects large files to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".gguf")
LARGE = ".safetensors"
"""Files with this ending are kept in the store and named by SHA-256, as Git LFS does."""


@dataclass
class FakeRepo:
    """One model on the hub."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    downloads: int = 0
    tags: tuple[str, ...] = ("transformers", "safetensors", "license:apache-2.0")
    branches: tuple[str, ...] = ()
    """Beside main; all have the same files."""
    messages: list[str] = field(default_factory=list)
    """Of the commits made through the hub."""

    def all_tags(self) -> list[str]:
        """Those set here, and those in the front matter of the model card."""
        front = self.files.get("README.md", b"").decode().partition("\n---\n")[0]
        return [
            *self.tags,
            *(line.removeprefix("- ") for line in front.splitlines() if line.startswith("- ")),
        ]

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(map(etag, self.files.values()))).hexdigest()


def json_lines(body: bytes) -> list[Any]:
    return [json.loads(line) for line in body.splitlines()]


def etag(content: bytes) -> bytes:
    return hashlib.sha1(content).hexdigest().encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class RecordedRequest:
    """One request that the hub received."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """The hub's content and behavior, and the requests it received."""

    repos: dict[str, FakeRepo] = field(default_factory=dict)
    token: str = "hf_the_right_token"
    """The one token that is valid; it opens what is in ``granted``."""
    granted: set[str] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    """Answer what has the key in its path with this status."""
    bodies: dict[str, bytes] = field(default_factory=dict)
    """Answer what has the key in its path with this."""
    error_body: bytes = b""
    """What answers by ``statuses`` hold."""
    endless: str = ""
    """Answer what has this in its path with a body that does not end."""
    sent_bytes: int = 0
    """Of bodies that do not end."""
    html: bool = False
    """Answer everything with a page for people, as a captive portal does."""
    drops: list[int] = field(default_factory=list)
    """Bytes after which each of the next responses of the store is cut off."""
    ignores_ranges: bool = False
    damaged: bool = False
    """The store's bytes are not those of the file."""
    stalls: threading.Event | None = None
    """The store waits for this in the middle of a file."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded to the store, by SHA-256."""
    upload_drops: list[int] = field(default_factory=list)
    """Bytes after which each of the next uploads to the store is cut off."""
    read_only: bool = False
    """The token may not write."""
    requests: list[RecordedRequest] = field(default_factory=list)
    url: str = ""
    store_url: str = ""

    def sent(self, method: str, path: str) -> int:
        """Return how many requests were sent to paths that contain ``path``."""
        return sum(request.method == method and path in request.path for request in self.requests)

    def blob(self, digest: str) -> bytes | None:
        for repo in self.repos.values():
            for content in repo.files.values():
                if sha256(content) == digest:
                    return content
        return None

    def ranges(self, path: str) -> list[str | None]:
        """Return the requested ranges of paths that contain ``path``, in order."""
        return [request.range for request in self.requests if path in request.path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def pieces(self) -> Iterator[bytes]:
        """Yield the body of the request."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                piece = self.rfile.read(min(left, 1 << 14))
                left -= len(piece)
                yield piece

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(RecordedRequest(self.command, self.path, self.headers.get("Range"), token))
        status = next((status for part, status in self.hub.statuses.items() if part in self.path), None)
        if status is not None or self.hub.html:
            # Unread, it would be taken for the next request; a connection that closes loses that one.
            for _ in self.pieces():
                pass
        body = next((body for part, body in self.hub.bodies.items() if part in self.path), None)
        if self.hub.endless and self.hub.endless in self.path:
            self.answer_without_end(status or 200)
        elif body is not None:
            self.answer(200, body)
        elif status is not None:
            self.answer(status, self.hub.error_body, {"Retry-After": "7"})
        elif self.hub.html:
            self.answer(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        else:
            self.route(token)

    def route(self, token: str | None) -> None:
        """Answer one request that is to be answered."""

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_without_end(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.close_connection = True
        # Far above every bound, and an end if there is none.
        while self.hub.sent_bytes < 1 << 28:
            try:
                self.wfile.write(b'["' + b"a" * (1 << 20))
            except OSError:
                return
            self.hub.sent_bytes += 1 << 20

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, headers={"X-Error-Code": code, "X-Error-Message": message})


class _HubHandler(_Handler):
    def route(self, token: str | None) -> None:
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        query = parse_qs(url.query)
        if token is not None and token != self.hub.token:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif self.command == "POST":
            self.write(parts, json_lines(b"".join(self.pieces())), token)
        elif parts == ["api", "models"]:
            self.search(query)
        elif parts[:2] == ["api", "models"]:
            self.page(parts[2:], token)
        elif "resolve" in parts:
            at = parts.index("resolve")
            self.file("/".join(parts[:at]), "/".join(parts[at + 2 :]), token)
        else:
            self.refuse(404, "", "Not found")

    def write(self, parts: list[str], body: list[Any], token: str | None) -> None:
        """Answer a request that changes something."""
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if token is None or self.hub.read_only:
            self.refuse(403 if token else 401, "", "You don't have the rights to write")
        elif parts == ["api", "repos", "create"]:
            self.create(body[0])
        elif parts == ["api", "validate-yaml"]:
            self.json({"errors": [], "warnings": []})
        elif name not in self.hub.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif parts[-2:] == ["objects", "batch"]:
            self.json({"transfer": "basic", "objects": [self.batch_entry(**o) for o in body[0]["objects"]]})
        elif parts[-1] == "verify":
            is_here = len(self.hub.blobs.get(body[0]["oid"], b"")) == body[0]["size"]
            self.answer(200 if is_here else 404)
        elif parts[4] == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular"}
                for f in body[0]["files"]
            ]
            self.json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        else:
            self.commit(name, body)

    def create(self, settings: dict[str, Any]) -> None:
        name = f"{settings['organization'] or 'me'}/{settings['name']}"
        is_private = settings.get("private", settings.get("visibility") == "private")
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            self.json({"url": url, "error": "You already created this model repo"}, 409)
            return
        self.hub.repos[name] = FakeRepo({".gitattributes": b"*.gguf lfs"}, private=is_private, tags=())
        self.json({"url": url})

    def batch_entry(self, oid: str, size: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in self.hub.blobs:
            entry["actions"] = {
                "upload": {"href": f"{self.hub.store_url}/{oid}?signature=secret"},
                "verify": {"href": f"{self.hub.url}/{self.path.strip('/').partition('.git')[0]}/verify"},
            }
        return entry

    def commit(self, name: str, lines: list[Any]) -> None:
        repo, (header, *operations) = self.hub.repos[name], lines
        if header["value"].get("parentCommit") != repo.commit:
            self.refuse(412, "", "A commit has happened since")
            return
        for operation in operations:
            value = operation["value"]
            is_lfs = operation["key"] == "lfsFile"
            content = self.hub.blobs[value["oid"]] if is_lfs else base64.b64decode(value["content"])
            repo.files[value["path"]] = content
        repo.messages.append(header["value"]["summary"])
        url = f"{self.hub.url}/{name}/commit/{repo.commit}"
        self.json({"commitUrl": url, "commitOid": repo.commit})

    def search(self, query: dict[str, list[str]]) -> None:
        wanted, tags = query.get("search", [""])[0].lower(), set(query.get("filter", []))
        results = [
            _summary(name, repo)
            for name, repo in self.hub.repos.items()
            if wanted in name.lower() and tags <= set(repo.tags) and not repo.private
        ]
        results.sort(key=lambda entry: -entry["downloads"])
        self.json(results[: int(query.get("limit", ["1000"])[0])])

    def page(self, parts: list[str], token: str | None) -> None:
        name = "/".join(parts[:2])
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and token is None):
            status = 401 if token is None else 404
            self.refuse(status, "RepoNotFound", "Repository not found")
        elif parts[2:3] == ["revision"] and "/".join(parts[3:]) not in ("main", repo.commit, *repo.branches):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif parts[2:3] == ["tree"]:
            self.json([_tree_entry(*item) for item in repo.files.items()])
        else:
            siblings = [_sibling(*item) for item in repo.files.items()]
            self.json({**_summary(name, repo), "sha": repo.commit, "siblings": siblings})

    def file(self, name: str, file: str, token: str | None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and token is None):
            self.refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif repo.gated and (token is None or name not in self.hub.granted):
            self.refuse(401 if token is None else 403, "GatedRepo", f"Access to {name} is restricted")
        elif file not in repo.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = repo.files[file]
            common = {"X-Repo-Commit": repo.commit}
            if file.endswith(LARGE):
                common |= {
                    "Location": f"{self.hub.store_url}/{sha256(content)}?signature=secret",
                    "X-Linked-Etag": f'"{sha256(content)}"',
                    "X-Linked-Size": str(len(content)),
                }
                self.answer(302, headers=common)
            else:
                self.ranged(content, common | {"ETag": f'"{git_hash(content)}"'})

    def ranged(self, content: bytes, headers: dict[str, str]) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if self.headers.get("Range") and content:
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.answer(206, content[start:], headers)
        else:
            self.answer(200, content, headers)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class _StoreHandler(_Handler):
    def receive(self) -> None:
        """Store an uploaded file, or cut it off."""
        most = self.hub.upload_drops.pop(0) if self.hub.upload_drops else None
        received = bytearray()
        for piece in self.pieces():
            received += piece
            if most is not None and len(received) >= most:
                self.close_connection = True
                self.connection.shutdown(2)
                return
        digest = urlsplit(self.path).path.strip("/")
        assert sha256(bytes(received)) == digest
        self.hub.blobs[digest] = bytes(received)
        self.answer(200)

    def route(self, token: str | None) -> None:
        if self.command == "PUT":
            self.receive()
            return
        content = self.hub.blob(urlsplit(self.path).path.strip("/"))
        if content is None:
            self.answer(404)
            return
        if self.hub.damaged:
            content = bytes(byte ^ 1 for byte in content)
        range_header = self.headers.get("Range")
        start = 0
        if range_header and not self.hub.ignores_ranges:
            start = int(range_header.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start or (range_header and not self.hub.ignores_ranges) else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:]
        if self.hub.drops:
            self.wfile.write(body[: self.hub.drops.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif self.hub.stalls is not None:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.hub.stalls.wait()
            self.wfile.write(body[half:])
        else:
            self.wfile.write(body)


def _summary(name: str, repo: FakeRepo) -> dict[str, Any]:
    config = json.loads(repo.files.get("config.json", b"{}"))
    return {
        "id": name,
        "downloads": repo.downloads,
        "gated": "manual" if repo.gated else False,
        "private": repo.private,
        "tags": repo.all_tags(),
        "config": config,
        "safetensors": {"parameters": {"F32": 2304}, "total": 2304},
        "lastModified": "2026-02-03T04:05:06.000Z",
    }


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve ``hub`` on two free ports of this machine for as long as the block lasts."""
    servers = []
    for base in (_HubHandler, _StoreHandler):
        handler = type(base.__name__, (base,), {"hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    hub.url, hub.store_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
