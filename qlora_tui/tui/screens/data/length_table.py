"""The table of sequence lengths on the Data screen: what each costs in memory and time."""

from __future__ import annotations

import asyncio

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.data.dataset_report import Report
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_duration, format_percent
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.length_costs import LengthCost, last_throughput, length_costs
from qlora_tui.tui.render.labels import VERDICT_SIGN, VERDICT_STYLE

_TIMED_WIDTH = 46
"""Least width in cells with a time column; the time at the recipe's length is shown above, too."""


def cost_table(costs: list[LengthCost], width: int) -> Content:
    """One line a length; the recipe's own is marked."""
    if not costs:
        return Content("")
    timed = width >= _TIMED_WIDTH and any(cost.seconds is not None for cost in costs)
    head = f"{'  max length':<15}{'whole':>6}  {'memory':>8}{'        time' if timed else ''}"
    lines = [Content.styled(head[:width], "dim")]
    for cost in costs:
        own = cost.name == "now"
        memory = format_bytes(cost.verdict.needed_bytes) if cost.verdict else "NA"
        time = f"{format_duration(cost.seconds):>12}" if timed else ""
        mark = "▸" if own else " "
        text = f"{mark} {cost.name:<5}{cost.length:>8,}{format_percent(cost.whole):>6}  {memory:>8}{time}"
        verdict = cost.verdict.word if cost.verdict else ""
        word = verdict if len(text) + len(verdict) + 2 <= width else VERDICT_SIGN.get(verdict, "")
        lines.append(
            Content.assemble((text, "bold" if own else ""), "  ", (word, VERDICT_STYLE.get(verdict, "")))
        )
    return Content("\n").join(lines)


def total_time(costs: list[LengthCost]) -> str:
    """``, about 41 min`` at the recipe's own length; nothing where it is not known."""
    own = next((cost for cost in costs if cost.name == "now" and cost.seconds is not None), None)
    return f", about {format_duration(own.seconds)}" if own else ""


class LengthCostReader:
    """Works out what other lengths would cost, and remembers how fast the model was trained last."""

    def __init__(self) -> None:
        self._throughput: tuple[str, float | None] | None = None

    async def read(
        self, report: Report, recipe: Recipe, architecture: Architecture | UserError, budget: MemoryBudget
    ) -> list[LengthCost]:
        """The costs of the lengths around the recipe's, from a whole report."""
        if self._throughput is None or self._throughput[0] != recipe.model.id:
            self._throughput = (recipe.model.id, await asyncio.to_thread(last_throughput, recipe.model.id))
        speed = self._throughput[1]
        return await asyncio.to_thread(length_costs, report, recipe, architecture, budget, speed)
