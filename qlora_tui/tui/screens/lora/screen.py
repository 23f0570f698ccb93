"""The LoRA screen: select the modules that get an adapter, set the adapter's rank, and see its costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial

import msgspec
from textual import work
from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_delta, pluralize
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.fields import fields, format_value, get_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.recipe.targets import (
    assign_pattern_values,
    match_modules,
    resolve_targets,
    split_patterns,
    syntax_error,
    to_patterns,
)
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.key_names import TITLE_GAP, key_hint, settings_title
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.lora.adapter import (
    COSTS,
    MemoryDeltas,
    SettingsList,
    adapter_text,
    adapter_title,
    choice_costs,
    choice_lines,
    costs_title,
    cursor_text,
    memory_deltas,
    modules_words,
    one_line,
    setting_lines,
)
from qlora_tui.tui.screens.lora.module_grid import ModuleGrid, ModuleTable
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen
from qlora_tui.tui.widgets.controls import Drawing, Lines, ModelProblem, Panel, TextField

SETTLED_S = 0.1
"""Seconds without a key press after which the memory is compared with the preset and with other choices."""
_COSTS_HEIGHT, _MEANING_HEIGHT = 32, 50
"""Minimum heights of the window, in rows. ``_COSTS_HEIGHT``: for the table of other choices, not counting the
rows of the grid. ``_MEANING_HEIGHT``: for explanations of the settings.
"""


READING = UserError(
    "Reading the model's structure",
    what="Reading the model's structure from transformers.",
    why="The model's modules are read once, which takes a few seconds.",
    fix="Wait, or continue on another screen.",
)


class LoraScreen(WorkScreen):
    """The LoRA screen: the grid of the model's modules, and the adapter's settings."""

    MODE = "lora"
    CSS_PATH = "lora.tcss"
    EDITS_RECIPE = True
    IS_DENSE = True

    def __init__(self) -> None:
        super().__init__()
        self._table: ModuleTable | None = None
        self._table_of: object = None
        self._deltas: tuple[Recipe, MemoryDeltas | None] | None = None
        self._deltas_key: object = None
        self._asks_costs = False
        """Whether the user has asked for the costs. If the window has no room for both the costs and the
        settings, the costs replace the settings.
        """
        self._explained = ""
        """Path of the setting that is explained; empty if the modules under the cursor are described."""

    def compose_body(self) -> Iterable[Widget]:
        keys = (
            ("lora.toggle", "toggle"),
            ("lora.block", "select layers"),
            ("lora.patterns", "patterns"),
            ("lora.all", "all"),
        )
        yield Panel("Adapter", Lines(id="lora-totals"), id="lora-cost")
        with Vertical(id="lora-parts"):
            yield Panel(
                "Target modules",
                TextField(compact=True, id="targets-input"),
                ModuleGrid(id="modules"),
                ModelProblem(),
                Lines(id="under-cursor"),
                keys=keys,
                id="modules-panel",
            )
            settings = SettingsList(id="lora-settings", classes="quiet")
            yield Panel("Settings", settings, id="lora-settings-panel")
        yield Panel(COSTS, Drawing(id="choices"), id="choices-panel")

    def on_mount(self) -> None:
        self.query_one("#targets-input").display = False
        title = settings_title("Settings", ("lora.rank_up", "raises"), ("lora.rank_down", "lowers"))
        self.query_one("#lora-settings-panel", Panel).show_title(title)
        self.query_one("#choices-panel", Panel).empty = "calculating…"
        self.query_one("#modules").focus()

    def on_resize(self) -> None:
        self._lay_out()
        self.call_after_refresh(lambda: self.show_recipe(self.app.workbench.recipe))

    def _lay_out(self) -> None:
        """Show the costs of other ranks and target modules if there is room, or if the user has asked for
        them.
        """
        has_room = self._has_room_for_costs
        self.set_class(has_room or self._asks_costs, "-costs")
        self.set_class(self._asks_costs and not has_room, "-only-costs")
        # Without the costs, the modules fill the remaining height. Set the height here instead of with a
        # style class. A style class would take effect only after the texts are written, and Textual would not
        # lay out the panel again.
        for part in ("#lora-parts", "#modules-panel", "#modules"):
            self.query_one(part).styles.height = "auto" if has_room else "1fr"
        self.refresh_bindings()

    @property
    def _has_room_for_costs(self) -> bool:
        rows = len(self._table.rows) if self._table is not None else 0
        return self.size.height >= _COSTS_HEIGHT + rows and self.size.width >= WIDE_CELLS

    def show_recipe(self, recipe: Recipe) -> None:
        architecture = self.app.workbench.architecture()
        if not isinstance(architecture, UserError) and architecture.is_outline:
            architecture = READING
        missing = architecture if isinstance(architecture, UserError) else None
        if self._table_of is not architecture:
            self._table_of = architecture
            self._table = None if isinstance(architecture, UserError) else ModuleTable(architecture)
            self._lay_out()
        self.query_one(ModelProblem).show(missing)
        self.set_class(missing is not None, "-no-model")
        text = ", ".join(recipe.lora.target_modules)
        title = Content.assemble("Target modules", (f": {text}", "$foreground not bold"))
        title = TITLE_GAP.join((title, key_hint("←→", "layers")))
        self.query_one("#modules-panel", Panel).show_title(title)
        self._show_chosen(recipe.lora.target_modules, recipe)
        self._show_controls_and_totals(recipe)
        budget = self.app.memory_budget
        key = (
            recipe,
            budget,
            self.has_class("-costs"),
            self.has_class("-very-wide"),
            self.has_class("-roomy"),
        )
        if key != self._deltas_key and not isinstance(architecture, UserError):
            self._deltas_key = key
            self._compute_deltas(recipe, budget, architecture)

    def action_step_setting(self, path: str, direction: int = 1) -> None:
        """Step a setting up to its next value (1) or down to its previous value (-1), and explain the
        setting.
        """
        self._explained = path
        self.query_one(SettingsList).select_setting(path)
        super().action_step_setting(path, direction)
        self._show_cursor()

    def on_settings_list_stepped(self, message: SettingsList.Stepped) -> None:
        """Step the setting that is named in the message."""
        self.action_step_setting(message.path, message.direction)

    def on_option_list_option_highlighted(self) -> None:
        """If the list of settings has the focus, explain the setting under its cursor."""
        if self.query_one(SettingsList).has_focus:
            self.on_descendant_focus()

    def on_descendant_focus(self) -> None:
        """Explain the setting under the cursor if the list of settings has the focus; otherwise, describe the
        modules under the cursor.
        """
        settings = self.query_one(SettingsList)
        self._explained = (settings.current or "") if settings.has_focus else ""
        self._show_cursor()

    def action_toggle_modules(self) -> None:
        settings = self.query_one(SettingsList)
        if settings.has_focus:
            settings.action_step(1)
        elif self._table is not None:
            self.query_one(ModuleGrid).toggle()

    def action_block(self) -> None:
        if self._table is not None:
            self.query_one(ModuleGrid).toggle_block_selection()

    def action_costs(self) -> None:
        self._asks_costs = not self._asks_costs
        self._lay_out()
        self.show_recipe(self.app.workbench.recipe)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return not self._has_room_for_costs if action == "costs" else True

    def action_all_linear(self) -> None:
        self.app.edit("lora.target_modules", (ALL_LINEAR,))

    def action_set_custom_value(self, name: str) -> None:
        """Ask for a rank or alpha for only the modules under the cursor. ``name``: ``rank`` or ``alpha``."""
        recipe, modules = self.app.workbench.recipe, self.query_one(ModuleGrid).under_cursor
        architecture = self.app.workbench.architecture()
        if isinstance(architecture, UserError) or not modules:
            return
        names, targets = {module.name for module in modules}, architecture.targets
        setting, usual = f"lora.{name}", get_setting(recipe, f"lora.{name}")

        def set_value(text: str) -> None:
            number = msgspec.convert(text.strip() or usual, fields()[setting].type, strict=False)
            own = get_setting(recipe, f"{setting}_pattern")
            self.app.edit(f"{setting}_pattern", assign_pattern_values(own, usual, names, number, targets))
            self.query_one(ModuleGrid).action_clear_block()

        title = f"{name.title()} of {', '.join(to_patterns(names, targets))}"
        text = (
            f"{pluralize(len(names), 'module')}. Leave empty to use {format_value(usual)}, as for all "
            "other modules."
        )
        self.ask(TextPromptScreen(title, text, "", lambda typed: validate_number(setting, typed)), set_value)

    def action_edit_targets(self) -> None:
        field = self.query_one("#targets-input", Input)
        field.value = ", ".join(self.app.workbench.recipe.lora.target_modules)
        field.display = True
        field.focus()

    def on_module_grid_chosen(self, message: ModuleGrid.Chosen) -> None:
        """Set the recipe's target modules to short patterns for the selected modules."""
        if self._table is None:
            return
        patterns = to_patterns(message.names, self._table.modules)
        if not patterns:
            self.notify("LoRA needs at least one module.", severity="warning")
        else:
            self.app.edit("lora.target_modules", patterns)

    def on_module_grid_moved(self) -> None:
        """Describe the modules under the cursor."""
        self._explained = ""
        self._show_cursor()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show which modules the typed patterns select. The recipe changes only when Enter is pressed."""
        if not event.input.has_focus or self._table is None:
            return
        try:
            patterns = parse_targets(event.value, self._table.modules)
        except UserError as problem:
            self._show_error(problem)
            return
        self._show_chosen(patterns, self.app.workbench.recipe)
        modules = match_modules(patterns, self._table.modules)
        text = Content(f"{len(modules)} modules. Enter: apply · Esc: cancel")
        self.query_one("#under-cursor", Lines).show(text)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Set the recipe's target modules to the typed patterns if they are valid; otherwise, show the
        error.
        """
        modules = self._table.modules if self._table is not None else ()
        try:
            patterns = parse_targets(event.value, modules) if self._table is not None else (event.value,)
        except UserError as problem:
            self._show_error(problem)
            return
        self._close_targets_input()
        self.app.edit("lora.target_modules", patterns)

    def key_escape(self) -> None:
        """Close the field for patterns, without changing the recipe."""
        if self.query_one("#targets-input").display:
            self._close_targets_input()

    # Give a description, so that Textual does not format the arguments. Otherwise, it would format thousands
    # of modules at each key press.
    @work(exclusive=True, group="deltas", description="compute deltas")
    async def _compute_deltas(self, recipe: Recipe, budget: MemoryBudget, architecture: Architecture) -> None:
        await asyncio.sleep(SETTLED_S)
        base = self.app.workbench.preset_recipe
        known = await asyncio.to_thread(memory_deltas, recipe, base, architecture, budget.device)
        self._deltas = (recipe, known)
        self._show_controls_and_totals(recipe)
        if self.has_class("-costs"):
            costs = await asyncio.to_thread(choice_costs, recipe, architecture, budget)
            panel = self.query_one("#choices-panel", Panel)
            panel.empty = ""
            panel.show_title(costs_title(costs))
            with_bars = self.has_class("-very-wide") and self.has_class("-roomy")
            lines = partial(choice_lines, costs, with_bars)
            self.query_one("#choices", Drawing).show(lines)

    def _show_controls_and_totals(self, recipe: Recipe) -> None:
        app, base, width = self.app, self.app.workbench.preset_recipe, max(20, self.size.width - 4)
        with_meaning = self.has_class("-very-wide") and self.size.height >= _MEANING_HEIGHT
        write = partial(setting_lines, recipe, base, self._dora_cost, with_meaning=with_meaning)
        self.query_one(SettingsList).show(write)
        self._show_cursor()
        title = adapter_title(app.workbench, app.memory_budget, width)
        self.query_one("#lora-cost", Panel).show_title(title)
        text = adapter_text(app.workbench, app.memory_budget, self._known_deltas, width)
        self.query_one("#lora-totals", Lines).show(text)

    @property
    def _known_deltas(self) -> MemoryDeltas | None:
        """Differences in memory for the current recipe; None until they have been computed, or if they are
        unknown.
        """
        is_known = self._deltas is not None and self._deltas[0] == self.app.workbench.recipe
        return self._deltas[1] if self._deltas is not None and is_known else None

    @property
    def _dora_cost(self) -> str:
        return format_delta(self._known_deltas.dora_bytes) if self._known_deltas else ""

    def _close_targets_input(self) -> None:
        self.query_one("#targets-input").display = False
        self.query_one("#modules").focus()
        self.show_recipe(self.app.workbench.recipe)

    def _show_error(self, problem: UserError) -> None:
        text = f"✗ {problem.what} ▸ {problem.fix}" if problem.fix else f"✗ {problem.what}"
        self.query_one("#under-cursor", Lines).show(Content.styled(text, "$error"))

    def _show_chosen(self, patterns: tuple[str, ...], recipe: Recipe) -> None:
        if self._table is not None:
            self.query_one(ModuleGrid).show(self._table, self._table.chosen(patterns), recipe.lora)

    def _show_cursor(self) -> None:
        """Update the line below the grid. If the target modules have an error, show the error. Otherwise,
        explain the setting in ``_explained``; if it is empty, describe the modules under the cursor.
        """
        recipe = self.app.workbench.recipe
        # While the user types patterns, this line shows which modules they select.
        if self._table is None or self.query_one("#targets-input").display:
            return
        try:
            resolve_targets(recipe.lora, self._table.modules)
        except UserError as problem:
            self._show_error(problem)
            return
        grid = self.query_one(ModuleGrid)
        text = cursor_text(grid.under_cursor, recipe.lora, in_block=grid.has_block)
        if self._explained:
            text = one_line(self._explained)
        elif self.has_class("-costs") and not self.has_class("-only-costs"):
            # Use the same number of lines for every module, so that the panels below do not move.
            gap = "\n" if self.has_class("-roomy") else "  "
            width = grid.content_size.width
            room = width if gap == "\n" else width - text.cell_length - len(gap)
            text += Content.styled(f"{gap}{modules_words(grid.under_cursor, recipe.lora, room)}", "dim")
        if self.has_class("-costs") and not self.has_class("-roomy"):
            text = text.truncate(max(1, grid.content_size.width), ellipsis=True)
        self.query_one("#under-cursor", Lines).show(text)


def parse_targets(text: str, modules: Sequence[LinearModule]) -> tuple[str, ...]:
    """Return the patterns in a typed text, with abbreviated kinds written out.

    Raises UserError if there is no pattern, or if a pattern is invalid or selects no module.
    """
    patterns = tuple(_written_out(pattern, modules) for pattern in split_patterns(text) if pattern)
    if not patterns:
        raise UserError(
            "No target modules",
            what="LoRA needs at least one module.",
            fix="Type all-linear, or patterns such as q,v.",
        )
    for pattern in patterns:
        if error := syntax_error(pattern):
            raise UserError("Not a target pattern", what=error[0], fix=error[1])
    match_modules(patterns, modules)
    return patterns


def validate_number(setting: str, text: str) -> str:
    """Return the error message for a setting's typed value; empty if it is valid. Empty text is valid."""
    field = fields()[setting]
    try:
        if text.strip():
            msgspec.convert(text.strip(), field.type, strict=False)
    except msgspec.ValidationError:
        return f"The value must be {field.expected}."
    return ""


def _written_out(pattern: str, modules: Sequence[LinearModule]) -> str:
    """Return a target pattern without abbreviations.

    ``all`` becomes ``all-linear``. ``8-23.q`` becomes ``8-23.q_proj`` if no kind is named ``q``, and exactly
    one kind begins with ``q_``. Any other pattern is returned unchanged.
    """
    layers, dot, kind = pattern.rpartition(".")
    kinds = dict.fromkeys(module.kind for module in modules)
    if kind in kinds or kind == ALL_LINEAR:
        return pattern
    if kind == "all":
        return f"{layers}{dot}{ALL_LINEAR}"
    meant = [name for name in kinds if name.startswith(f"{kind}_")]
    return f"{layers}{dot}{meant[0]}" if len(meant) == 1 else pattern
