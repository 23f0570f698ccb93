"""The warning for samples longer than the model's context: allowed, but rarely intended."""

from __future__ import annotations

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError

_LEARNED_POSITION_TABLES = ("wpe", "embed_positions")


def context_length_warning(length: int, architecture: Architecture) -> UserError | None:
    """Return the warning where samples may have ``length`` tokens; None where they fit the context."""
    limit = architecture.max_positions
    if limit is None or length <= limit:
        return None
    learned_positions = any(
        table.name.endswith(_LEARNED_POSITION_TABLES) for table in architecture.embeddings
    )
    return UserError(
        "Longer than the model's context",
        what=f"Samples may be {length:,} tokens long, and the model's context is {limit:,}.",
        why="It has no embedding for later positions: a longer sample makes the run fail."
        if learned_positions
        else "It was not trained on later positions, so longer samples will be learned poorly.",
        fix=f"Set the sequence length (data.max_length) to {limit:,} or less.",
    )
