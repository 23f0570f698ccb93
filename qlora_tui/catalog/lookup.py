"""A model's architecture without its weights: enough for an estimate, before any download."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_cache import store_config, stored_config
from qlora_tui.catalog.config_parser import MAX_CONFIG_BYTES, parse_architecture
from qlora_tui.catalog.hub import fetch_config
from qlora_tui.catalog.local_models import ModelNotFoundError, resolve_model
from qlora_tui.errors import UserError
from qlora_tui.foreign_files import read_bounded

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_architecture(model_id: str) -> Architecture:
    """Load the architecture of a local model, of a folder with only a ``config.json``, or of such a file.

    Of a Hub model whose weights are not here, the config that :func:`fetch_architecture` stored is used.

    Raises UserError where the model is not on this machine or its config cannot be used.
    """
    if (config := _config_file(model_id)) is not None:
        return parse_architecture(config)
    try:
        return resolve_model(model_id).architecture
    except ModelNotFoundError:
        if (config := stored_config(model_id)) is None:
            raise
        return parse_architecture(config)


def is_fetchable(model_id: str) -> bool:
    """Return whether the name has the form of a Hub id, publisher/model."""
    return _HUB_ID.fullmatch(model_id) is not None


def fetch_architecture(model_id: str, revision: str = "main") -> Architecture:
    """Fetch the ``config.json`` of a Hub model, and nothing else of it, and store it for later estimates.

    Raises UserError where the Hub cannot be reached or has no such model.
    """
    try:
        config = fetch_config(model_id, revision)
    except UserError as problem:
        raise problem.replace(
            what=f"{model_id} is not on this machine. {problem.what}",
            fix=f"{problem.fix} An estimate needs only the model's config.json: "
            "copy it into a folder and give that folder as the model.",
        ) from problem
    architecture = parse_architecture(config)
    with suppress(OSError):
        store_config(model_id, config)
    return architecture


def load_model_config(model_id: str) -> dict[str, Any]:
    """Load the ``config.json`` of a model, a folder or a file. Raises UserError where it cannot be read."""
    file = _config_file(model_id)
    try:
        file = file or resolve_model(model_id).folder / "config.json"
    except ModelNotFoundError:
        if (file := stored_config(model_id)) is None:
            raise
    try:
        return msgspec.json.decode(read_bounded(file, MAX_CONFIG_BYTES), type=dict[str, Any])
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
