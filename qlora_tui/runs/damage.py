"""Checks that a checkpoint or an adapter is intact, by sizes and checksums. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from qlora_tui import checksums
from qlora_tui.decoding import read_json
from qlora_tui.runs.event_log import last_event
from qlora_tui.runs.events import Finished, Stopped

MARKER = "complete"
"""File in a checkpoint that lists every file with its size. It is written last."""
WEIGHTS = "adapter_model.safetensors"
_SIZES = msgspec.json.Decoder(dict[str, int])
ADAPTER_FILES = (WEIGHTS, "adapter_config.json")
"""Files that peft reads from an adapter or a checkpoint."""


def checkpoint_damage(folder: Path) -> str | None:
    """Describe the damage to a checkpoint in a clause; return None if it is intact. Reads every file."""
    sizes = read_json(folder / MARKER, _SIZES)
    if sizes is None:
        return "its list of files cannot be read"
    for name, size in sizes.items():
        try:
            actual = (folder / name).stat().st_size
        except (OSError, ValueError):
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} of {size} bytes"
    if checksums.NAME not in sizes:
        return f"{checksums.NAME} is missing"
    return checksums.mismatch(folder, listed=sizes.keys() - {checksums.NAME})


def adapter_damage(folder: Path) -> str | None:
    """Describe the damage to a run's adapter in a clause; return None if it is intact. Reads every file."""
    for name in (*ADAPTER_FILES, checksums.NAME):
        if not (folder / name).is_file():
            return f"{name} is missing"
    return checksum_damage(folder)


def checksum_damage(folder: Path, *, only: Collection[str] = ()) -> str | None:
    """Describe how the folder of an adapter or checkpoint differs from its checksums, in a clause.

    Returns None if the folder matches or never had checksums: neither the checkpoint's list of files nor the
    run's last event mentions them. ``only`` has the names of the files to read; empty reads all files.
    """
    recorded = _recorded_digest(folder)
    try:
        if recorded and checksums.digest(folder) != recorded:
            return f"{checksums.NAME} has changed since it was written: its checksum differs"
    except OSError as error:
        return f"{checksums.NAME} cannot be read ({error.strerror or error})"
    if not (folder / checksums.NAME).exists():
        return None if recorded is None else f"{checksums.NAME} is missing"
    return checksums.mismatch(folder, only, ADAPTER_FILES)


def _recorded_digest(folder: Path) -> str | None:
    """Return the recorded hash of the folder's checksum file.

    Empty if there were checksums but their hash was not recorded; None if there were none.
    """
    if (folder / MARKER).is_file():
        return "" if checksums.NAME in (read_json(folder / MARKER, _SIZES) or {}) else None
    try:
        ending = last_event(folder.parent / "events.jsonl")
    except OSError:
        return None
    return (ending.checksums or None) if isinstance(ending, Finished | Stopped) else None
