"""Good first models, from ``starter_models.toml``: the Model screen lists those that fit.

Each has the keys of its ``config.json`` that decide its shapes, so that its memory is estimated before
anything is downloaded.
"""

from __future__ import annotations

import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture


class StarterModel(Struct, frozen=True, forbid_unknown_fields=True):
    """A model on the Hub."""

    id: str
    license: str
    """Name of the license, as on the Hub."""
    billions: float
    """Parameters that are loaded for training on text, in billions."""
    good_for: str
    """What it is good for, in a few words."""
    source: str
    """Where its sizes were read."""
    config: dict[str, Any]
    gated: bool | None = None
    """Whether its license must be accepted on the Hub; None if that was not confirmed."""
    layer_types: tuple[str, ...] = ()
    """Kinds of its layers, repeated to their number."""

    def full_config(self) -> dict[str, Any]:
        """Return its ``config.json``, as far as it decides shapes."""
        if not self.layer_types:
            return self.config
        text = self.config.get("text_config", self.config)
        kinds = [self.layer_types[i % len(self.layer_types)] for i in range(text["num_hidden_layers"])]
        return self.config | (
            {"layer_types": kinds} if text is self.config else {"text_config": text | {"layer_types": kinds}}
        )

    def architecture(self) -> Architecture:
        """Return its modules and parameters. Raises UserError if this version cannot train it."""
        return parse_architecture(self.full_config())


class StarterFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``starter_models.toml``."""

    checked: datetime.date
    """Day on which its facts were last compared with their sources."""
    demo: StarterModel
    """The demo's model, which comes from the Python package index."""
    models: tuple[StarterModel, ...]
    """From the smallest to the largest."""


@cache
def starter_file() -> StarterFile:
    """Return all good first models."""
    content = files("qlora_tui.catalog").joinpath("starter_models.toml").read_bytes()
    return msgspec.toml.decode(content, type=StarterFile)
