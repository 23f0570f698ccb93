"""Lines of the models worth starting with, for a user who has none. Imported and used in a thread."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.formatting import format_bytes, format_gib
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.tui.screens.models.starter_choice import Starter
from qlora_tui.tui.widgets.vi_list import HEADING

_GAP = 2
"""Cells between two columns."""


def starter_lines(models: tuple[Starter, ...], budget: MemoryBudget, width: int) -> list[tuple[str, Content]]:
    """(id, line) of each model under a heading; columns at the right are left out without room for them."""
    names = max(len(model.id) for model in models)
    columns = [
        ("memory", [f"{format_gib(model.needs_bytes)} GiB" for model in models]),
        ("download", [format_bytes(model.download_bytes) for model in models]),
        ("license", [model.license for model in models]),
    ]
    rows = [Content(" " * names), *(Content.styled(f"{model.id:<{names}}", "bold") for model in models)]
    for title, cells in columns:
        column = max(map(len, (title, *cells)))
        if rows[0].cell_length + _GAP + column > width:
            break
        texts = (f"{' ' * _GAP}{cell:>{column}}" for cell in (title, *cells))
        rows = [
            row + Content.styled(text, "dim" if title != "memory" else "")
            for row, text in zip(rows, texts, strict=True)
        ]
    heading = f"Worth starting with on {budget.name}; Tab, then Enter to find one"
    ids = (f"{HEADING}columns", *(model.id for model in models))
    return [(HEADING, Content.styled(heading, "dim")), *zip(ids, rows, strict=True)]
