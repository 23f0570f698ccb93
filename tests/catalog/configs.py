"""The copied configs, and how an architecture compares with what transformers builds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.described import describe

CONFIGS = Path(__file__).parent.parent / "configs"


def config(name: str) -> dict[str, Any]:
    """The config of ``org/name``, parsed."""
    values: dict[str, Any] = json.loads((CONFIGS / f"{name.replace('/', '__')}.json").read_text())
    return values


def architecture(name: str) -> Architecture:
    """The exact architecture of ``org/name``."""
    return describe(config(name))


def counted() -> dict[str, dict[str, str]]:
    """The rows of ``params.csv`` by model."""
    with (CONFIGS / "params.csv").open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def named_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter as ``model.named_parameters()`` gives it: full name and shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in architecture.modules:
        shape = (module.out_features, module.in_features)
        shapes[f"{module.name}.weight"] = shape[::-1] if module.conv1d else shape
        if module.bias:
            shapes[f"{module.name}.bias"] = (module.out_features,)
    for embedding in architecture.embeddings:
        shapes[f"{embedding.name}.weight"] = (embedding.rows, embedding.width)
    for parameter in architecture.parameters:
        shapes[parameter.name] = parameter.shape
    head = architecture.head
    if not head.tied:
        shapes[f"{head.name}.weight"] = (head.out_features, head.in_features)
    if head.bias:
        shapes[f"{head.name}.bias"] = (head.out_features,)
    return shapes
