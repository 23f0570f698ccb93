"""Target patterns as a person types them: ``q,k,v,o`` for ``q_proj, k_proj, v_proj, o_proj``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from qlora_tui.catalog.architecture_types import LinearModule
from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import ALL_LINEAR
from qlora_tui.recipe.targets import match_modules, split_patterns, syntax_error


def parse_targets(text: str, modules: Sequence[LinearModule]) -> tuple[str, ...]:
    """Parse typed patterns, each kind written out.

    Raises UserError for one that is wrong or touches nothing.
    """
    patterns = tuple(_written_out(pattern, modules) for pattern in split_patterns(text) if pattern)
    if not patterns:
        raise UserError(
            "No target modules", what="LoRA needs at least one module.", fix="Write all-linear, or q,v."
        )
    for pattern in patterns:
        if error := syntax_error(pattern):
            raise UserError("Not a target pattern", what=error[0], fix=error[1])
    match_modules(patterns, modules)
    return patterns


def validate_number(setting: str, text: str) -> str:
    """Return what is wrong with a typed number for a setting, or an empty string. Empty is valid."""
    field = fields()[setting]
    try:
        if text.strip():
            msgspec.convert(text.strip(), field.type, strict=False)
    except msgspec.ValidationError:
        return f"It must be {field.expected}."
    return ""


def _written_out(pattern: str, modules: Sequence[LinearModule]) -> str:
    """Expand ``8-23.q`` to ``8-23.q_proj`` if exactly one kind starts with ``q_`` and none is named ``q``."""
    layers, dot, kind = pattern.rpartition(".")
    kinds = dict.fromkeys(module.kind for module in modules)
    if kind in kinds or kind == ALL_LINEAR:
        return pattern
    if kind == "all":
        return f"{layers}{dot}{ALL_LINEAR}"
    meant = [name for name in kinds if name.startswith(f"{kind}_")]
    return f"{layers}{dot}{meant[0]}" if len(meant) == 1 else pattern
