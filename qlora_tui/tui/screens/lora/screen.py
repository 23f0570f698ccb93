"""LoRA: which modules get an adapter, its rank, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

import msgspec
from textual import work
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Static

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import precision_of
from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.fields import fields, get_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.recipe.targets import assign_pattern_values, match_modules, resolve_targets, to_patterns
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.commands import Command
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.lora.commands import COMMANDS
from qlora_tui.tui.screens.lora.controls import controls_text, targets_advice
from qlora_tui.tui.screens.lora.module_grid import ModuleGrid
from qlora_tui.tui.screens.lora.module_table import ModuleTable
from qlora_tui.tui.screens.lora.target_input import parse_targets, validate_number
from qlora_tui.tui.screens.lora.totals import (
    MemoryDeltas,
    cursor_text,
    difference_text,
    format_delta,
    memory_deltas,
    totals_text,
)
from qlora_tui.tui.screens.modals.text_prompt import TextPromptScreen
from qlora_tui.tui.widgets.model_problem import ModelProblem
from qlora_tui.tui.widgets.static_update import update_if_changed
from qlora_tui.tui.widgets.text_field import TextField

SETTLED_S = 0.1
"""Seconds without a key before the memory deltas are computed."""


class LoraScreen(WorkScreen):
    """The model's own modules with check boxes, beside the settings of the adapter."""

    MODE = "lora"
    CSS_PATH = "lora.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "Each row is a kind of linear module, each cell one layer: ■ gets an adapter, · stays frozen. On "
        "a name, {lora.toggle} selects or deselects the whole kind; on a cell, only that layer. "
        "{lora.block} starts a block of cells; pressed again, it toggles the block. The first row stands "
        "for every kind. {lora.rank_here} gives the selected modules a custom rank, shown as ◆.\n"
        "An adapter adds B·A × alpha/rank to a weight. Only A and B are trained."
    )
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = COMMANDS

    class DeltasReady(Message):
        """The estimates that a key press does not wait for."""

        def __init__(self, recipe: Recipe, deltas: MemoryDeltas | None) -> None:
            super().__init__()
            self.recipe = recipe
            self.deltas = deltas

    def __init__(self) -> None:
        super().__init__()
        self._table: ModuleTable | None = None
        self._table_of: object = None
        self._deltas: tuple[Recipe, MemoryDeltas | None] | None = None
        self._deltas_key: tuple[Recipe, MemoryBudget] | None = None

    def compose_body(self) -> Iterable[Widget]:
        with Horizontal(id="targets-line"):
            yield Static("targets ", id="targets-label")
            yield Static(id="targets-text", markup=False)
            yield TextField(compact=True, id="targets-input")
        with Horizontal(id="lora-parts"):
            with Vertical(id="grid-side"):
                yield ModuleGrid(id="modules")
                yield ModelProblem()
                yield Static(id="under-cursor")
            yield Static(id="lora-settings")
        yield Static(id="lora-totals")

    def on_mount(self) -> None:
        self.query_one("#targets-input").display = False
        self.query_one("#modules").focus()

    def on_resize(self) -> None:
        self.call_after_refresh(lambda: self.show_recipe(self.qlora_app.workbench.recipe))

    def show_recipe(self, recipe: Recipe) -> None:
        architecture = self.qlora_app.workbench.architecture()
        missing = architecture if isinstance(architecture, UserError) else None
        if self._table_of is not architecture:
            self._table_of = architecture
            self._table = None if isinstance(architecture, UserError) else ModuleTable(architecture)
        self.query_one("#modules").display = missing is None
        self.query_one("#under-cursor").display = missing is None
        self.query_one(ModelProblem).show(missing)
        self._show_targets(recipe)
        self._show_controls_and_totals(recipe)
        key = (recipe, self.qlora_app.memory_budget)
        if key != self._deltas_key and not isinstance(architecture, UserError):
            self._deltas_key = key
            self._compute_deltas(*key, architecture)

    def action_toggle_modules(self) -> None:
        """Select or deselect the modules under the cursor."""
        if self._table is not None:
            self.query_one(ModuleGrid).toggle()

    def action_block(self) -> None:
        """Start a block, or toggle the one that was started."""
        if self._table is not None:
            self.query_one(ModuleGrid).toggle_block_selection()

    def action_all_linear(self) -> None:
        """Every linear module."""
        self.qlora_app.edit("lora.target_modules", (ALL_LINEAR,))

    def action_set_custom_value(self, name: str) -> None:
        """Ask for a custom rank or alpha of the modules under the cursor."""
        recipe, modules = self.qlora_app.workbench.recipe, self.query_one(ModuleGrid).under_cursor
        architecture = self.qlora_app.workbench.architecture()
        if isinstance(architecture, UserError) or not modules:
            return
        names = {module.name for module in modules}
        setting, usual = f"lora.{name}_pattern", get_setting(recipe, f"lora.{name}")

        def on_result(text: str | None) -> None:
            if text is not None:
                number = msgspec.convert(text.strip() or usual, fields()[f"lora.{name}"].type, strict=False)
                own = get_setting(recipe, setting)
                self.qlora_app.edit(
                    setting, assign_pattern_values(own, usual, names, number, architecture.modules)
                )
                self.query_one(ModuleGrid).action_clear_block()

        self.app.push_screen(
            TextPromptScreen(
                f"{name.title()} of {', '.join(to_patterns(names, architecture.modules))}",
                f"{len(names)} modules. Leave empty for {format_value(usual)}, as for all others.",
                "",
                lambda text: validate_number(f"lora.{name}", text),
            ),
            on_result,
        )

    def action_edit_targets(self) -> None:
        """Edit the target patterns as text; the modules follow while they are typed."""
        field = self.query_one("#targets-input", Input)
        field.value = ", ".join(self.qlora_app.workbench.recipe.lora.target_modules)
        field.display = True
        self.query_one("#targets-text").display = False
        field.focus()

    def on_lora_screen_deltas_ready(self, message: DeltasReady) -> None:
        """Show what the estimates say, if the recipe is still the same."""
        if message.recipe == self.qlora_app.workbench.recipe:
            self._deltas = (message.recipe, message.deltas)
            self._show_controls_and_totals(message.recipe)

    def on_module_grid_chosen(self, message: ModuleGrid.Chosen) -> None:
        """Write the choice into the recipe, as short patterns."""
        if self._table is None:
            return
        patterns = to_patterns(message.names, self._table.modules)
        if not patterns:
            self.notify("LoRA needs at least one module.", severity="warning")
        else:
            self.qlora_app.edit("lora.target_modules", patterns)

    def on_module_grid_moved(self) -> None:
        """Describe the modules under the cursor."""
        self._show_cursor()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what the patterns typed so far would choose; the recipe changes on enter."""
        if not event.input.has_focus or self._table is None:
            return
        try:
            patterns = parse_targets(event.value, self._table.modules)
        except UserError as problem:
            self._show_error(problem)
            return
        self._show_chosen(patterns, self.qlora_app.workbench.recipe)
        modules = match_modules(patterns, self._table.modules)
        self.query_one("#under-cursor", Static).update(f"{len(modules)} modules. Enter: apply · Esc: cancel")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Apply the typed patterns."""
        modules = self._table.modules if self._table is not None else ()
        try:
            patterns = parse_targets(event.value, modules) if self._table is not None else (event.value,)
        except UserError as problem:
            self._show_error(problem)
            return
        self._close_targets_input()
        self.qlora_app.edit("lora.target_modules", patterns)

    def key_escape(self) -> None:
        """Leave the patterns as they were."""
        if self.query_one("#targets-input").display:
            self._close_targets_input()

    # Without a description, Textual would format the arguments, thousands of modules, at each key.
    @work(exclusive=True, group="deltas", description="compute deltas")
    async def _compute_deltas(self, recipe: Recipe, budget: MemoryBudget, architecture: Architecture) -> None:
        await asyncio.sleep(SETTLED_S)
        base = self.qlora_app.workbench.preset_recipe
        known = await asyncio.to_thread(memory_deltas, recipe, base, architecture, budget.device)
        self.post_message(self.DeltasReady(recipe, known))

    def _deltas_for(self, recipe: Recipe) -> MemoryDeltas | None:
        return self._deltas[1] if self._deltas is not None and self._deltas[0] == recipe else None

    def _show_controls_and_totals(self, recipe: Recipe) -> None:
        self._show_controls(recipe)
        update_if_changed(self.query_one("#lora-totals", Static), self._totals(recipe))

    def _close_targets_input(self) -> None:
        self.query_one("#targets-input").display = False
        self.query_one("#targets-text").display = True
        self.query_one("#modules").focus()
        self.show_recipe(self.qlora_app.workbench.recipe)

    def _show_error(self, problem: UserError) -> None:
        text = f"✗ {problem.what} ▸ {problem.fix}" if problem.fix else f"✗ {problem.what}"
        update_if_changed(self.query_one("#under-cursor", Static), Content.styled(text, "$error"))

    def _show_targets(self, recipe: Recipe) -> None:
        text = ", ".join(recipe.lora.target_modules)
        note = targets_advice(recipe.lora)
        width_left = self.size.width - len("targets ") - len(text) - 4
        update_if_changed(
            self.query_one("#targets-text", Static),
            Content.assemble((text, "bold"), (f"  {note}" if width_left >= len(note) else "", "$text-muted")),
        )
        self._show_chosen(recipe.lora.target_modules, recipe)
        self._show_cursor()

    def _show_chosen(self, patterns: tuple[str, ...], recipe: Recipe) -> None:
        if self._table is None:
            return
        try:
            names = frozenset(module.name for module in match_modules(patterns, self._table.modules))
        except UserError:
            names = frozenset()
        self.query_one(ModuleGrid).show(self._table, names, recipe.lora)

    def _show_cursor(self) -> None:
        recipe = self.qlora_app.workbench.recipe
        if self._table is None:
            return
        try:
            resolve_targets(recipe.lora, self._table.modules)
        except UserError as problem:
            self._show_error(problem)
            return
        grid = self.query_one(ModuleGrid)
        update_if_changed(
            self.query_one("#under-cursor", Static),
            cursor_text(grid.under_cursor, recipe.lora, in_block=grid.has_block),
        )

    def _show_controls(self, recipe: Recipe) -> None:
        panel = self.query_one("#lora-settings", Static)
        deltas = self._deltas_for(recipe)
        text = controls_text(
            recipe,
            self.qlora_app.workbench.preset_recipe,
            format_delta(deltas.dora_bytes) if deltas else "",
            max(20, panel.content_size.width),
            one_line_each=self.size.width < WIDE_CELLS,
        )
        update_if_changed(panel, text)

    def _totals(self, recipe: Recipe) -> Content:
        workbench = self.qlora_app.workbench
        differs = difference_text(workbench, self._deltas_for(recipe), max(20, self.size.width - 2))
        compared = workbench.comparison(self.qlora_app.memory_budget.device)
        architecture = workbench.architecture()
        if isinstance(compared, UserError) or isinstance(architecture, UserError):
            return differs
        return Content("\n").join(
            [totals_text(recipe, architecture, compared[precision_of(recipe)]), differs]
        )
