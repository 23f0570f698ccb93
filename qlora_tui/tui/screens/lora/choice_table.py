"""What other ranks and targets would cost: trained parameters, size on disk, memory, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from textual.content import Content
from textual.widgets import Static

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_count, format_gib
from qlora_tui.memory import estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import check_fit
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import verdict_words
from qlora_tui.tui.screens.lora.totals import saved_bytes, trained_parameters
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

_RANKS = (4, 8, 16, 32, 64, 128, 256)
_TARGETS = {
    "all-linear": ("all-linear",),
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gate, up, down": ("gate_proj", "up_proj", "down_proj"),
    "q, v": ("q_proj", "v_proj"),
}
_NAME = 15
_WORDS = 62
"""Cells of a line without its bar."""
_MAX_BAR = 40
_MIN_BAR = 6


@dataclass(frozen=True)
class ChoiceCost:
    """The recipe with another rank, or with other targets."""

    name: str
    of: Literal["rank", "targets"]
    is_current: bool
    trained: int
    saved_bytes: int
    total_bytes: int
    limit_bytes: int
    word: str
    """Verdict of the estimate."""


class ChoicesPanel(Panel):
    """The table, with the keys for the rank."""

    def __init__(self) -> None:
        self._table = Static(id="choices")
        self._costs: tuple[ChoiceCost, ...] = ()
        self._can_train = True
        keys = (("lora.rank_up", "rank ×2"), ("lora.rank_down", "rank ÷2"))
        super().__init__("What other choices would cost", self._table, keys=keys, id="choices-panel")

    def show(self, costs: tuple[ChoiceCost, ...], *, can_train: bool) -> None:
        """Show these; nothing until they are known. ``can_train``: whether the model can be trained."""
        self._costs, self._can_train = costs, can_train
        self._redraw()

    def on_resize(self) -> None:
        # The table knows its new width only after the layout.
        self.call_after_refresh(self._redraw)

    def _redraw(self) -> None:
        lines = choice_lines(self._costs, self._table.content_size.width, can_train=self._can_train)
        update_if_changed(self._table, Content("\n").join(lines))


def choice_costs(recipe: Recipe, architecture: Architecture, budget: MemoryBudget) -> tuple[ChoiceCost, ...]:
    """Compute an estimate for each choice, some 10 ms each; without those that the model does not have."""
    costs = []
    for of, name, changed in _choices(recipe, architecture):
        try:
            estimated = estimate(changed, architecture, device=budget.device)
            trained, saved = trained_parameters(changed, architecture), saved_bytes(changed, architecture)
        except UserError:
            continue
        word = check_fit(estimated, budget.bytes).word
        costs.append(
            ChoiceCost(name, of, changed == recipe, trained, saved, estimated.total_bytes, budget.bytes, word)
        )
    return tuple(costs)


def _choices(
    recipe: Recipe, architecture: Architecture
) -> Iterator[tuple[Literal["rank", "targets"], str, Recipe]]:
    for rank in sorted({*_RANKS, recipe.lora.rank}):
        yield "rank", f"rank {rank}", replace_setting(recipe, "lora.rank", rank)
    for name, targets in _TARGETS.items():
        if name == "all-linear" or set(targets) <= set(architecture.kinds()):
            yield "targets", name, replace_setting(recipe, "lora.target_modules", targets)


def choice_lines(costs: tuple[ChoiceCost, ...], width: int, *, can_train: bool = True) -> list[Content]:
    """``▸ rank 16   40M   154 MiB  ███░░░░  6.3 GiB fits``: a line for each, the recipe's own marked.

    Ranks stand under the head of the columns, targets under one that says they are for the recipe's rank.
    """
    if not costs:
        return []
    cells = min(_MAX_BAR, width - _WORDS)
    drawn = cells + 1 if cells >= _MIN_BAR else 0
    head = f"  {'':<{_NAME}} {'trainable':>9} {'on disk':>9}  {'':<{drawn}}{'memory':>9}"
    lines = [Content.styled(head, "dim")]
    for before, cost in zip((None, *costs), costs, strict=False):
        if before is not None and cost.of != before.of:
            lines += [Content(""), Content.styled("  targets, at the rank marked above", "dim")]
        mark, style = ("▸", "bold") if cost.is_current else (" ", "")
        disk = format_bytes(cost.saved_bytes)
        share = f"{bar(cost.total_bytes / cost.limit_bytes, cells)} " if drawn else ""
        lines.append(
            Content.assemble(
                (mark, "bold $accent"),
                (f" {cost.name:<{_NAME}} {format_count(cost.trained):>9} {disk:>9}  ", style),
                (share, "$secondary"),
                (f"{format_gib(cost.total_bytes):>5} GiB ", style),
                verdict_words(cost.word, can_train=can_train),
            )
        )
    return lines
