"""A model's architecture without its weights: enough for an estimate, before any download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import MOST_CONFIG_BYTES, parse_architecture
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.errors import UserError
from qlora_tui.foreign_files import read_bounded


def load_architecture(model_id: str) -> Architecture:
    """Load the architecture of a local model, of a folder with only a ``config.json``, or of such a file.

    Raises UserError where the model is not on this machine or its config cannot be used.
    """
    config = _config_file(model_id)
    return resolve_model(model_id).architecture if config is None else parse_architecture(config)


def load_model_config(model_id: str) -> dict[str, Any]:
    """Load the ``config.json`` of a model, a folder or a file. Raises UserError where it cannot be read."""
    file = _config_file(model_id) or resolve_model(model_id).folder / "config.json"
    try:
        return msgspec.json.decode(read_bounded(file, MOST_CONFIG_BYTES), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(
            "No config.json for a trace",
            what=f"{file} could not be read.",
            why="A GGUF file stores its settings in its own header.",
            fix="Choose the model it was made from; the estimate without a trace does not need it.",
        ) from error


def _config_file(model_id: str) -> Path | None:
    path = Path(model_id).expanduser()
    for config in (path / "config.json", path):
        if config.suffix == ".json" and config.is_file():
            return config
    return None
