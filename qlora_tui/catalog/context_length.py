"""Samples longer than the model's own context: no error, but seldom meant."""

from __future__ import annotations

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError

_LEARNED_POSITION_TABLES = ("wpe", "embed_positions")


def context_length_warning(length: int, architecture: Architecture) -> UserError | None:
    """The warning where samples may be ``length`` tokens long; None where the model's context holds them."""
    limit = architecture.max_positions
    if limit is None or length <= limit:
        return None
    learned_positions = any(
        table.name.endswith(_LEARNED_POSITION_TABLES) for table in architecture.embeddings
    )
    return UserError(
        "Longer than the model's context",
        what=f"Samples may be {length:,} tokens long, and the model's context is {limit:,}.",
        why="It has no embedding for a place beyond that: a longer sample ends the run."
        if learned_positions
        else "It has never seen a place beyond that, so longer samples are learnt badly.",
        fix=f"Set data.max_length to {limit:,} or less.",
    )
