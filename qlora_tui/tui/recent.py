"""Files and folders chosen lately, so that they need not be looked for again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qlora_tui import paths
from qlora_tui.files import atomic_write

_KEPT = 20


def recent(kind: str) -> list[Path]:
    """The last ones of a kind (``data``, ``models``) that are still there, newest first."""
    try:
        names = msgspec.json.decode(_file(kind).read_bytes(), type=list[str])
    except (OSError, msgspec.MsgspecError):
        return []
    return [path for path in map(Path, names) if path.exists()]


def remember(kind: str, path: Path) -> None:
    """Put one in front."""
    others = [known for known in recent(kind) if known != path]
    atomic_write(_file(kind), msgspec.json.encode([str(p) for p in [path, *others][:_KEPT]]))


def _file(kind: str) -> Path:
    return paths.state_dir() / f"recent-{kind}.json"
