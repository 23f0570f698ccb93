"""The model families as tables, by the ``model_type`` of their config.

A family without a table is rejected by name. To add one, write its table next to the most similar family; a
slow test compares every table with the model that transformers builds, name by name.
"""

from __future__ import annotations

from qlora_tui.catalog.families import gpt_like, hybrid, llama_like, moe_families
from qlora_tui.catalog.families.vision import COMPOSITES, Composite
from qlora_tui.catalog.family_spec import Family

__all__ = ["COMPOSITE", "FAMILY", "Composite"]

FAMILY: dict[str, Family] = {
    model_type: family
    for module in (llama_like, moe_families, gpt_like, hybrid)
    for family in module.FAMILIES
    for model_type in family.model_types
}
COMPOSITE: dict[str, Composite] = {composite.model_type: composite for composite in COMPOSITES}
