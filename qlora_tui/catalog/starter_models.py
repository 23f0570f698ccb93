"""Models for a first run, from ``starter_models.toml``. The Model screen lists those that fit into memory.

Each has the keys of its ``config.json`` that determine its shapes, so that its memory is estimated before
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
    """A model for a first run. All of these models except the demo's are on the Hub."""

    id: str
    license: str
    """Name of the license, as on the Hub."""
    billions: float
    """Number of parameters that are loaded for training on text, in billions."""
    good_for: str
    """What the model is good for, in a few words."""
    source: str
    """Where the model's sizes were read."""
    config: dict[str, Any]
    gated: bool | None = None
    """Whether the user must accept the license on the Hub; None if that was not confirmed."""
    layer_types: tuple[str, ...] = ()
    """Layer types, repeated until every layer has one. Empty if ``config`` is complete without them."""

    def full_config(self) -> dict[str, Any]:
        """Return the model's ``config.json``, as far as it determines shapes."""
        if not self.layer_types:
            return self.config
        text = self.config.get("text_config", self.config)
        kinds = [self.layer_types[i % len(self.layer_types)] for i in range(text["num_hidden_layers"])]
        return self.config | (
            {"layer_types": kinds} if text is self.config else {"text_config": text | {"layer_types": kinds}}
        )

    def architecture(self) -> Architecture:
        """Return the model's modules and parameters. Raises UserError if this version cannot train it."""
        return parse_architecture(self.full_config())


class StarterFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``starter_models.toml``."""

    checked: datetime.date
    """Date on which the entries of this file were last compared with their sources."""
    demo: StarterModel
    """The demo's model, which comes from the Python package index."""
    models: tuple[StarterModel, ...]
    """The models, from the smallest to the largest."""


@cache
def starter_file() -> StarterFile:
    """Return the content of ``starter_models.toml``."""
    content = files("qlora_tui.catalog").joinpath("starter_models.toml").read_bytes()
    return msgspec.toml.decode(content, type=StarterFile)
