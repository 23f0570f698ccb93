"""What was asked of the trainer while it works: files in ``control/``, and SIGTERM."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from qlora_tui.runs import control
from qlora_tui.runs.control import Kind, Request
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Asked
from qlora_tui.training.reporter import Reporter


class Requests:
    """Requests that wait for the next edge of a step."""

    def __init__(self, run: RunDir, reporter: Reporter) -> None:
        self._run = run
        self._reporter = reporter
        self._waiting: list[Request] = []
        self._terminated = False

    def listen_to_signals(self) -> None:
        """SIGTERM and SIGINT ask to stop with a checkpoint; a second one ends the process as ever."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def look(self) -> None:
        """Take what is new, and say so in the events."""
        for request in control.take(self._run):
            self._reporter.tell(Asked(at=time.time(), request=request.kind, value=request.value))
            self._reporter.log(
                f"asked: {request.kind}{'' if request.value is None else f' {request.value:g}'}"
            )
            self._waiting.append(request)
        if self._terminated:
            self._terminated = False
            self._reporter.tell(Asked(at=time.time(), request="stop"))
            self._waiting.append(Request(kind="stop"))

    def take(self, kind: Kind) -> Request | None:
        """The last waiting request of a kind; earlier ones of the same kind are done with it."""
        found = [request for request in self._waiting if request.kind == kind]
        self._waiting = [request for request in self._waiting if request.kind != kind]
        return found[-1] if found else None

    def ending(self) -> Kind | None:
        """``stop`` or ``pause`` where one of them waits; it goes on waiting."""
        kinds = {request.kind for request in self._waiting}
        return "stop" if "stop" in kinds else "pause" if "pause" in kinds else None

    def _on_signal(self, number: int, frame: object) -> None:
        self._terminated = True
        signal.signal(number, signal.SIG_DFL)


Edge = Callable[[], None]
"""Called where a run may end before it trains; raises :class:`EndedEarly`."""


class EndedEarly(Exception):
    """A request to stop or pause came before the first step."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind = kind
