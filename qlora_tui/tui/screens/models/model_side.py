"""The panels beside the list of models: facts of one model, its memory, and the room on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from textual import work
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.formatting import format_gib
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.models.model_fit import ModelFit, fit_lines, model_fit
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

_TALL = 31
"""Rows from which there is room for the third panel."""


class ModelSide(Vertical):
    """Shows one model; its memory is estimated in a thread."""

    def __init__(self) -> None:
        super().__init__(id="model-side")
        self._fit: ModelFit | None = None
        self._can_train = True

    def compose(self) -> Iterable[Widget]:
        with Panel("Model", id="model-panel"), VerticalScroll(id="model-scroll", can_focus=False):
            yield Static(id="model-facts")
        with Panel("Memory", keys=(("app.assume_gpu", "GPU size"), ("go.memory", "details")), id="fit-panel"):
            yield Static(id="fit")
        yield Panel("Storage", Static(id="storage"), id="storage-panel")

    def on_mount(self) -> None:
        self.query_one("#fit-panel").display = False

    def on_resize(self) -> None:
        self.query_one("#storage-panel").display = self.size.height >= _TALL
        # The width of the panel inside follows.
        self.call_after_refresh(self._show_fit)

    def show(self, title: str, lines: Sequence[Content]) -> None:
        """Show these facts."""
        self.query_one("#model-panel", Panel).show_title(title)
        update_if_changed(self.query_one("#model-facts", Static), Content("\n").join(lines))

    def show_storage(self, lines: Sequence[Content]) -> None:
        """Show what models take on the disk."""
        update_if_changed(self.query_one("#storage", Static), Content("\n").join(lines))

    @work(exclusive=True, group="fit")
    async def estimate(
        self, model: Architecture | None, recipe: Recipe, budget: MemoryBudget, *, can_train: bool
    ) -> None:
        """Estimate and show the memory of a model; without one the panel is hidden."""
        self._fit, self._can_train = None, can_train
        if model is not None:
            self._fit = await asyncio.to_thread(model_fit, model, recipe, budget)
        self.query_one("#fit-panel").display = self._fit is not None
        self.call_after_refresh(self._show_fit)

    def _show_fit(self) -> None:
        panel = self.query_one("#fit-panel", Panel)
        width = panel.content_size.width
        if self._fit is not None and width:
            budget = self._fit.budget
            assumed = " (assumed)" if budget.is_assumed else ""
            panel.show_title(f"Memory needed, of {format_gib(budget.bytes)} GiB{assumed}")
            lines = fit_lines(self._fit, width, can_train=self._can_train)
            update_if_changed(self.query_one("#fit", Static), Content("\n").join(lines))
