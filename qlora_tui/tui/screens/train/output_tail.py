"""The end of the trainer's output, line by line, as a terminal would show it."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_tui.runs.event_log import read_from
from qlora_tui.tui.screens.train.log_tail import LogEntry

_MAX_BYTES = 128 << 10
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class OutputTail:
    """Reads a growing text file on from where it stopped; the first look takes only its end."""

    def __init__(self, path: Path, max_lines: int) -> None:
        self.entries: list[LogEntry] = []
        """Appended to; replaced by a shorter list when it has become too long."""
        self._path = path
        self._max_lines = max_lines
        self._offset: int | None = None

    def read(self) -> None:
        """Take in the whole lines that are new."""
        if self._offset is None:
            size = self._path.stat().st_size if self._path.exists() else 0
            self._offset = max(0, size - _MAX_BYTES)
        chunk = read_from(self._path, self._offset, _MAX_BYTES * 4)
        end = chunk.rfind(b"\n") + 1
        self._offset += end
        lines = chunk[:end].decode("utf-8", "replace").split("\n")[:-1]
        self.entries += [LogEntry(None, "info", strip_escapes(line)) for line in lines]
        if len(self.entries) > 2 * self._max_lines:
            self.entries = self.entries[-self._max_lines :]


def strip_escapes(line: str) -> str:
    """Remove colors and cursor moves; a progress bar becomes its last state."""
    shown = _ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]
    return _CONTROLS.sub("", shown.expandtabs(4))
