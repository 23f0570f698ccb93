"""State that the app keeps between sessions for convenience, in one file. The user may delete the file at any
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.decoding import read_json
from qlora_tui.files import atomic_write

_MAX_RECENT = 20
Kind: TypeAlias = Literal["data", "models", "system_prompts", "palette"]


class UiState(Struct, frozen=True, omit_defaults=True):
    """Contents of ``ui_state.json``."""

    recent: Mapping[Kind, tuple[str, ...]] = {}
    """Recently used paths and texts, newest first, by kind, such as ``models``."""
    last_seen: float = 0.0
    """Unix time when the app was last in use. Runs that ended after this time are announced at the next
    start.
    """
    download_bytes_per_s: float = 0.0
    """Speed of the last completed download, in bytes per second; 0 before the first download."""


_DECODER = msgspec.json.Decoder(UiState)


def load_ui_state() -> UiState:
    """Return the contents of the file. If the file is missing or unreadable, return the defaults."""
    return read_json(_file(), _DECODER) or UiState()


def save_ui_state(**changes: Any) -> None:
    """Change these fields of the saved state. Errors while writing the file are ignored."""
    state = msgspec.structs.replace(load_ui_state(), **changes)
    with suppress(OSError, UnicodeEncodeError):
        atomic_write(_file(), msgspec.json.encode(state))


def recent(kind: Kind) -> tuple[str, ...]:
    """Return the recent entries of a kind, newest first."""
    return load_ui_state().recent.get(kind, ())


def recent_paths(kind: Kind) -> list[Path]:
    """Return the recent paths of a kind, newest first, without paths that no longer exist."""
    return [path for path in map(Path, recent(kind)) if _exists(path)]


def add_recent(kind: Kind, text: str | Path) -> None:
    """Put an entry first in the list of its kind, and remove an older copy of the entry. An empty text is
    ignored.
    """
    state, added = load_ui_state().recent, str(text)
    if added:
        texts = (added, *(other for other in state.get(kind, ()) if other != added))
        save_ui_state(recent={**state, kind: texts[:_MAX_RECENT]})


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # The name is too long for the file system, or there is no permission to read the folder.
        return False


def _file() -> Path:
    return paths.state_dir() / "ui_state.json"
