"""Running downloads: child processes that outlive screen and app, and their messages.

A child writes JSON lines (``catalog.download``, ``demo.fetch``). They are read on the app's own loop, through
the pipe only: asyncio's subprocesses are killed when their loop ends, and a download should continue.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui import paths, subprocesses
from qlora_tui.catalog.download import spawn
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write

DEMO = "demo"
"""Id of the demo's model, which comes from the package index and not from the hub."""
_SPEED_OVER_S = 8.0
_LONGEST_LINE = 1 << 20


class Download:
    """One child process and its progress."""

    def __init__(self, id_: str, name: str, process: subprocess.Popen[bytes]) -> None:
        self.id = id_
        self.name = name
        self.done_bytes = 0
        self.total_bytes = 0
        self.status_text = "Listing files"
        """The current activity, if it is not downloading bytes."""
        self.path: Path | None = None
        """Where the model is, once it is."""
        self.problem: UserError | None = None
        self.canceled = False
        self._process = process
        self._seen: deque[tuple[float, int]] = deque(maxlen=64)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def bytes_per_s(self) -> float | None:
        """Speed over the last seconds; None until it can be measured."""
        if len(self._seen) < 2:
            return None
        (before_s, before), (now_s, now) = self._seen[0], self._seen[-1]
        return (now - before) / (now_s - before_s) if now_s > before_s and now > before else None

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the current speed; None if it is unknown."""
        speed = self.bytes_per_s
        return None if speed is None else (self.total_bytes - self.done_bytes) / speed

    def cancel(self) -> None:
        """Stop the download; the next download of the model resumes it."""
        self.canceled = True
        self._process.send_signal(signal.SIGINT)

    async def follow(self) -> AsyncIterator[None]:
        """Yield after each message of the child, until it ends."""
        assert self._process.stdout is not None
        reader = asyncio.StreamReader(limit=_LONGEST_LINE)
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while line := await reader.readline():
                self._on_message(msgspec.json.decode(line))
                yield
            code = await asyncio.to_thread(self._process.wait)
            if self.path is None and self.problem is None and not self.canceled:
                self.problem = UserError(
                    "The download ended",
                    what=f"{self.name}: the process ended with {code}.",
                    fix="Try again.",
                )
        finally:
            pipe.close()
        if self.path is not None and self.bytes_per_s is not None:
            save_speed(self.bytes_per_s)

    def _on_message(self, message: dict[str, Any]) -> None:
        match message["event"]:
            case "start" | "progress":
                self.done_bytes, self.total_bytes = message["done_bytes"], message["total_bytes"]
                self.status_text = ""
                now_s = time.monotonic()
                self._seen.append((now_s, self.done_bytes))
                while now_s - self._seen[0][0] > _SPEED_OVER_S:
                    self._seen.popleft()
            case "saying":
                self.status_text = message["text"]
            case "done":
                self.path = Path(message["path"])
            case "problem":
                self.problem = UserError(
                    message["title"], what=message["what"], why=message["why"], fix=message["fix"]
                )


def start(model_id: str) -> Download:
    """Start downloading a model from the Hub, resuming an earlier attempt."""
    return Download(model_id, model_id, spawn(model_id))


def start_demo(name: str) -> Download:
    """Begin to fetch and convert the demo's model."""
    process = subprocess.Popen(
        subprocesses.module_argv("qlora_tui.demo.fetch_worker"),
        env=subprocesses.subprocess_env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return Download(DEMO, name, process)


def save_speed(bytes_per_s: float) -> None:
    """For the next guess at how long a download will take."""
    atomic_write(_speed_path(), f"{bytes_per_s:.0f}\n")


def last_speed() -> float | None:
    """Bytes a second of the last download that ended well; None before the first."""
    try:
        return float(_speed_path().read_text()) or None
    except (OSError, ValueError):
        return None


def _speed_path() -> Path:
    return paths.state_dir() / "download-speed"
