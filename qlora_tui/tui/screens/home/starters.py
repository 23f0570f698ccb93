"""Models worth starting with on this machine, for a user who has none. Imported and used in a thread."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from qlora_tui.catalog.starter_models import STARTER_MODELS
from qlora_tui.formatting import format_bytes, format_gib
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.models.model_fit import need
from qlora_tui.tui.widgets.vi_list import HEADING

_MOST = 5
_MOST_PARAMETERS_ON_CPU = 2_000_000_000
"""Above, a step on a processor takes minutes."""
_GAP = 2
"""Cells between two columns."""
_BYTES_PER_WEIGHT = 2
"""Of the files on the Hub, which are in 16 bits."""


@dataclass(frozen=True)
class Starter:
    """A model, and what it needs with the recipe as it is."""

    id: str
    license: str
    parameters: int
    needs_bytes: int
    verdict: str


def starters(recipe: Recipe, budget: MemoryBudget) -> tuple[Starter, ...]:
    """The largest models that fit, from small to large; the smallest one where none does."""
    known = []
    for model in STARTER_MODELS:
        architecture = model.architecture()
        needs_bytes, verdict = need(architecture, recipe, budget)
        known.append(Starter(model.id, model.license, architecture.total_params, needs_bytes, verdict))
    on_cpu = budget.device.kind == "cpu"
    fitting = [
        starter
        for starter in known
        if starter.verdict == "fits" and not (on_cpu and starter.parameters > _MOST_PARAMETERS_ON_CPU)
    ]
    return tuple(fitting[-_MOST:] or known[:1])


def starter_lines(models: tuple[Starter, ...], budget: MemoryBudget, width: int) -> list[tuple[str, Content]]:
    """(id, line) of each model under a heading; columns at the right are left out without room for them."""
    names = max(len(model.id) for model in models)
    columns = [
        ("memory", [f"{format_gib(model.needs_bytes)} GiB" for model in models]),
        ("download", [format_bytes(model.parameters * _BYTES_PER_WEIGHT) for model in models]),
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
