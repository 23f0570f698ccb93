"""Two lines under the top line: what the recipe is, and what it costs on this card."""

from __future__ import annotations

from pathlib import Path

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from qlora_tui.format import gib
from qlora_tui.memory import Comparison, Verdict
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.widgets.memory_bar import bar
from qlora_tui.tui.workbench import Workbench

VERDICT_STYLE: dict[Verdict, str] = {
    "fits": "$success",
    "tight": "$warning",
    "uncertain": "$warning",
    "does not fit": "$error",
}
"""A colour beside the word, never instead of it."""


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
        self._comparison: Comparison | None = None
        self._available: int | None = None

    def show_recipe(self, workbench: Workbench, available_bytes: int | None) -> None:
        """Repaint with the recipe as it is now, against so much memory (None: no card)."""
        self._recipe_line = recipe_line(workbench)
        self._comparison = workbench.comparison(available_bytes)
        self._available = available_bytes
        self.refresh()

    def render(self) -> RenderResult:
        width = self.size.width
        line = self._recipe_line
        if len(line) > width:
            line = line[: width - 1] + "…"
        return Content(line) + "\n" + self._cost_line(width)

    def _cost_line(self, width: int) -> Content:
        if self._comparison is None:
            return Content.styled("Choose a model to see what it costs.", "dim")
        parts = [self._cost(label, width // 2 - 1) for label in ("nf4", "fp16")]
        return parts[0] + "  " + parts[1]

    def _cost(self, precision: str, width: int) -> Content:
        assert self._comparison is not None
        outcome = self._comparison.precisions[precision]
        name = precision.upper() if precision == "nf4" else precision
        total = outcome.total_bytes
        if self._available is None:
            return Content(f"{name} {gib(total)} GiB").pad_right(
                max(0, width - len(f"{name} {gib(total)} GiB"))
            )
        figures = f"{gib(total)} of {gib(self._available)} GiB"
        verdict = outcome.verdict
        room = width - len(name) - len(figures) - len(verdict) - 3
        drawn = bar(total / self._available, room) + " " if room >= 6 else ""
        text = f"{name} {drawn}{figures} "
        return Content.assemble(text, (verdict, VERDICT_STYLE[verdict])).pad_right(
            max(0, width - len(text) - len(verdict))
        )


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
