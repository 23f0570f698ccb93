"""The table of sequence lengths on the Data screen: what each costs in memory and time."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.formatting import format_bytes, format_duration, format_percent
from qlora_tui.runs.length_costs import LengthCost
from qlora_tui.tui.render.recipe_line import VERDICT_SIGN, VERDICT_STYLE

_TIMED_WIDTH = 46
"""Least width in cells with a time column; the time at the recipe's length is shown above, too."""


def cost_table(costs: list[LengthCost], width: int) -> Content:
    """One line a length; the recipe's own is marked."""
    if not costs:
        return Content("")
    timed = width >= _TIMED_WIDTH and any(cost.seconds is not None for cost in costs)
    head = f"{'  max length':<15}{'uncut':>6}  {'memory':>8}{'        time' if timed else ''}"
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
