"""Files and folders chosen lately, so that they need not be looked for again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec

from qlora_tui import paths
from qlora_tui.decoding import decode_json
from qlora_tui.files import atomic_write

_MAX_PATHS = 20
_NAMES = msgspec.json.Decoder(list[str])


def load_recent(kind: str) -> list[Path]:
    """The last ones of a kind (``data``, ``models``) that are still there, newest first."""
    try:
        names = decode_json(_file(kind).read_bytes(), _NAMES)
    except (OSError, msgspec.MsgspecError):
        return []
    return [path for path in map(Path, names) if _exists(path)]


def add_recent(kind: str, path: Path) -> None:
    """Put one in front, where disk and name allow it: nothing depends on it."""
    others = [known for known in load_recent(kind) if known != path]
    with suppress(OSError, UnicodeEncodeError):
        atomic_write(_file(kind), msgspec.json.encode([str(p) for p in [path, *others][:_MAX_PATHS]]))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name too long for the file system, or a folder that may not be read.
        return False


def _file(kind: str) -> Path:
    return paths.state_dir() / f"recent-{kind}.json"
