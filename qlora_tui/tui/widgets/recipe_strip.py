"""Two lines under the top line: what the recipe is, and what it costs on this card."""

from __future__ import annotations

from pathlib import Path

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from qlora_tui.errors import Problem
from qlora_tui.format import gib
from qlora_tui.memory import Estimate, judge
from qlora_tui.memory.estimate import Precision
from qlora_tui.memory.room import Room
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.widgets.memory_bar import bar
from qlora_tui.tui.workbench import Workbench

VERDICT_STYLE = {
    "fits": "$success",
    "tight": "$warning",
    "uncertain": "$warning",
    "does not fit": "$error",
}
"""A colour beside the word, never instead of it."""

_SHOWN: tuple[tuple[Precision, str], ...] = (("nf4", "NF4"), ("fp16", "fp16"))


class RecipeStrip(Widget):
    """Always in view while a recipe is edited; moves as its values change."""

    DEFAULT_CSS = """
    RecipeStrip {
        dock: top;
        height: 2;
        margin-top: 1;
        padding: 0 1;
        background: $surface;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipe_line = ""
        self._comparison: dict[Precision, Estimate] | Problem | None = None
        self._room: Room | None = None

    def show_recipe(self, workbench: Workbench, room: Room) -> None:
        """Repaint with the recipe as it is now, against the memory there is."""
        shown = (recipe_line(workbench), workbench.comparison(room.device), room)
        if shown != (self._recipe_line, self._comparison, self._room):
            self._recipe_line, self._comparison, self._room = shown
            self.refresh()

    def render(self) -> RenderResult:
        width = self.content_size.width
        line = self._recipe_line
        if len(line) > width:
            line = line[: width - 1] + "…"
        return Content.assemble(line, "\n", self._cost_line(width))

    def _cost_line(self, width: int) -> Content:
        if self._comparison is None or self._room is None:
            return Content("")
        if isinstance(self._comparison, Problem):
            problem = self._comparison
            return Content.styled(f"{problem.what} {problem.fix}".replace("\n", " ")[:width], "dim")
        each = (width - 2) // len(_SHOWN)
        costs = [_cost(name, self._comparison[key], self._room, each) for key, name in _SHOWN]
        return Content("  ").join(costs)


def _cost(name: str, made: Estimate, room: Room, width: int) -> Content:
    verdict = judge(made, room.bytes)
    figures = f"{gib(made.total_bytes)} of {gib(room.bytes)} GiB"
    free = width - len(name) - len(figures) - len(verdict.word) - 3
    drawn = f"{bar(made.total_bytes / room.bytes, free)} " if free >= 4 else ""
    text = Content.assemble(f"{name} {drawn}{figures} ", (verdict.word, VERDICT_STYLE[verdict.word]))
    return text.pad_right(max(0, width - text.cell_length))


def recipe_line(workbench: Workbench) -> str:
    """``balanced* · Qwen2.5-7B · tickets.jsonl · r16 all-linear · 2,048 tok × 2 × 8``."""
    recipe = workbench.recipe
    star = "*" if workbench.modified else ""
    targets = ",".join(recipe.lora.target_modules)
    training = recipe.training
    return " · ".join(
        [
            f"{workbench.preset}{star}",
            recipe.model.id.rstrip("/").rpartition("/")[2] or "no model",
            _data_words(recipe),
            f"r{recipe.lora.rank} {targets if len(targets) < 24 else targets[:23] + '…'}",
            f"{recipe.data.max_length:,} tok × {training.micro_batch} × {training.gradient_accumulation}",
        ]
    )


def _data_words(recipe: Recipe) -> str:
    sources = recipe.data.sources
    if not sources:
        return "no data"
    more = f" +{len(sources) - 1}" if len(sources) > 1 else ""
    return Path(sources[0].path).name + more
