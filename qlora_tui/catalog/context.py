"""Samples longer than the model's own context: no error, but seldom meant."""

from __future__ import annotations

from qlora_tui.catalog.facts import Architecture
from qlora_tui.errors import Problem

_LEARNT_PLACES = ("wpe", "embed_positions")


def beyond_context(length: int, architecture: Architecture) -> Problem | None:
    """The warning where samples may be ``length`` tokens long; None where the model's context holds them."""
    most = architecture.max_positions
    if most is None or length <= most:
        return None
    ends = any(table.name.endswith(_LEARNT_PLACES) for table in architecture.embeddings)
    return Problem(
        "Longer than the model's context",
        what=f"Samples may be {length:,} tokens long, and the model's context is {most:,}.",
        why="It has no embedding for a place beyond that: a longer sample ends the run."
        if ends
        else "It has never seen a place beyond that, so longer samples are learnt badly.",
        fix=f"Set data.max_length to {most:,} or less.",
    )
