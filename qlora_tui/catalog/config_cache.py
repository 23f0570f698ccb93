"""The ``config.json`` of models on the Hub, stored for estimates: nothing else of them is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.files import atomic_write, private_dir
from qlora_tui.paths import cache_dir


def store_config(model_id: str, config: dict[str, Any]) -> None:
    """Store the config of a Hub model. Raises OSError."""
    path = _path(model_id)
    private_dir(path.parent)
    atomic_write(path, msgspec.json.encode(config))


def stored_config(model_id: str) -> Path | None:
    """Return the file with the config of a Hub model; None if it was never fetched."""
    path = _path(model_id)
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):
        # A name too long for the file system, or with a NUL.
        return None


def _path(model_id: str) -> Path:
    return cache_dir() / "configs" / f"{model_id.replace('/', '--')}.json"
