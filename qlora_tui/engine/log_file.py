"""Where the engine's log is, known at both ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from qlora_tui.paths import state_dir

_ENOUGH_BYTES = 1 << 20


def log_path() -> Path:
    """What the engine and the libraries in it print."""
    return state_dir() / "engine.log"


def truncated_log() -> Path:
    """The log, emptied when it has grown long."""
    path = log_path()
    if path.exists() and path.stat().st_size > _ENOUGH_BYTES:
        path.write_bytes(b"")
    return path


def open_log() -> IO[bytes]:
    """The log, to write at its end; nowhere, where it cannot be written: that must not stop an engine."""
    try:
        return truncated_log().open("ab")
    except OSError:
        return Path(os.devnull).open("ab")
