"""A model's architecture without its weights: enough for an estimate, before any download."""

from __future__ import annotations

from pathlib import Path

from qlora_tui.catalog.architecture import read_architecture
from qlora_tui.catalog.facts import Architecture
from qlora_tui.catalog.local import resolve


def architecture_of(model_id: str) -> Architecture:
    """Of a model on this machine, of a folder that holds only a ``config.json``, or of such a file itself.

    Raises Problem where there is none to be had.
    """
    path = Path(model_id).expanduser()
    for config in (path / "config.json", path):
        if config.suffix == ".json" and config.is_file():
            return read_architecture(config)
    return resolve(model_id).architecture
