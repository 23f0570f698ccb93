"""The window for presets: preview what a preset changes; open, save, edit, import, export and delete presets;
undo changes to presets.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write
from qlora_tui.formatting import format_path, pluralize
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Verdict
from qlora_tui.memory.solver import what_if
from qlora_tui.process_end import how_ended
from qlora_tui.recipe import toml
from qlora_tui.recipe.fields import DESCRIPTIVE, diff_recipes, fields, format_value, get_setting
from qlora_tui.recipe.presets import (
    OverwriteError,
    Preset,
    PresetSnapshot,
    delete,
    list_presets,
    restore,
    save,
    take_snapshot,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.expected_time import Forecast, forecast
from qlora_tui.tui.commands import COMMANDS, screen_commands
from qlora_tui.tui.key_names import TITLE_GAP, dialog_keys, key_name
from qlora_tui.tui.render.columns import fact_lines, hanging
from qlora_tui.tui.render.labels import FitLine, error_content, fit_figure, place_words
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen, WorkerDialog, write_or_ask
from qlora_tui.tui.screens.modals.help import screen_help
from qlora_tui.tui.widgets.controls import Lines, TextField, ViList
from qlora_tui.tui.workbench import open_preset

EDITORS = ("sensible-editor", "nano", "vim", "vi")
"""Editors that are tried, in this order, if neither VISUAL nor EDITOR is set."""


def save_as(
    name: str, recipe: Recipe, *, note: str = "", own: str = "", overwrite: bool = False
) -> PresetSnapshot:
    """Save the recipe as the user's preset ``name``. Return a snapshot of the previous preset of this name,
    for undo.

    Raises OverwriteError if ``overwrite`` is False and the user already has a preset of this name. For
    ``own``, the preset on which the recipe is based, the error is raised only if the file was edited outside
    the app.
    """
    before = take_snapshot(name)
    if not overwrite and name != own and before.content is not None:
        raise OverwriteError(
            "Preset exists", what=f"You already have a preset named {name}. Saving would replace it."
        )
    save(name, recipe, note=note, overwrite=overwrite)
    return before


def import_preset(path: Path, *, overwrite: bool = False) -> PresetSnapshot:
    """Copy a preset file, with its comments, to the user's presets. The preset is named after the file.
    Return a snapshot of the user's previous preset of this name, for undo.

    A preset of this name that was edited outside the app is replaced only if ``overwrite``; otherwise,
    OverwriteError is raised. Raises UserError if the file is not a preset.
    """
    toml.load(path)
    before = take_snapshot(path.stem)
    restore(PresetSnapshot(path.stem, path.read_bytes()), overwrite=overwrite)
    return before


def export_preset(preset: Preset, target: Path, *, overwrite: bool = False) -> None:
    """Copy a preset's file to ``target``, a file or a folder. Raises OverwriteError if ``overwrite`` is False
    and the target file exists, and UserError if the target file cannot be written.
    """
    target = target / preset.path.name if target.is_dir() else target
    if not overwrite and target.exists():
        raise OverwriteError("File already exists", what=f"{target} would be replaced.")
    try:
        atomic_write(target, preset.path.read_bytes())
    except OSError as error:
        raise UserError(
            "Preset not exported", what=f"{target}: {error.strerror or error}.", fix="Choose another path."
        ) from error


def editor() -> list[str]:
    """Return the command of the user's editor, as a list of arguments. Raises UserError if no editor is
    found, or if the command cannot be parsed.
    """
    variable, wanted = _editor_setting()
    if wanted:
        try:
            return shlex.split(wanted)
        except ValueError as error:
            what = f"{variable} is {wanted}: {error}."
            raise UserError("Invalid editor command", what=what, fix=_set_editor_hint()) from error
    default_editor = next(filter(None, map(shutil.which, EDITORS)), None)
    if default_editor is None:
        raise UserError("No editor", what="Neither VISUAL nor EDITOR is set.", fix=_set_editor_hint())
    return [default_editor]


def _editor_setting() -> tuple[str, str]:
    """Return (name, value) of the environment variable that names the editor; (``EDITOR``, empty string) if
    no such variable is set.
    """
    visual = os.environ.get("VISUAL", "").strip()
    return ("VISUAL", visual) if visual else ("EDITOR", os.environ.get("EDITOR", "").strip())


def _set_editor_hint() -> str:
    return f"Quit the app, set an editor with `export {_editor_setting()[0]}=nano`, and start the app again."


def edit(preset: Preset) -> None:
    """Open the preset's file in the user's editor, and wait until the editor ends.

    Raises UserError if the preset is part of the app, or if the editor fails. After a failure, the file is as
    the editor left it.
    """
    if preset.shipped:
        raise UserError(
            "Shipped presets cannot be edited",
            what=f"{preset.name} is part of qlora-tui.",
            fix=f"Open it, press {key_name('presets.save')} to save it under another name, then edit the "
            "copy.",
        )
    command = editor()
    try:
        # While the app runs, its standard error is a log file, so the editor's standard error must be the
        # terminal.
        run = subprocess.run([*command, str(preset.path)], stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise UserError(
            "The editor did not start", what=f"{command[0]}: {error.strerror}.", fix=_set_editor_hint()
        ) from error
    if ended := run.returncode:
        raise UserError(
            "The editor exited with an error",
            what=f"{shlex.join(command)} {how_ended(ended)}. The preset is as the editor left it.",
            fix=_set_editor_hint(),
        )


_COMMANDS = screen_commands("presets")
_SHOWN = [command for command in _COMMANDS if command.footer and command.id != "presets.filter"]
"""Commands whose keys are shown in the lower border, because a dialog has no footer."""
_ALWAYS = (
    COMMANDS["presets.filter"].binding(),
    Binding("escape", "leave", "Close"),
    Binding("question_mark", "help", "Help"),
)
"""Keys that are shown in the upper border."""
_NEED_WIDTH = 30
"""Minimum width of the list, in cells, at which the memory of each preset is shown."""
_LABEL_WIDTH = 80
"""Minimum width of the preview, in cells, at which a setting has its label in addition to its path."""
_MIN_BAR, _MAX_BAR = 6, 24
_MAIN = (
    "quantization.method",
    "lora.rank",
    "lora.alpha",
    "lora.target_modules",
    "data.max_length",
    "training.micro_batch_size",
    "training.gradient_accumulation",
    "training.learning_rate",
    "training.epochs",
)
"""The settings in which presets differ most. They are shown if opening the preset would change nothing."""


@dataclass(frozen=True)
class _PresetChange:
    """A change to one of the user's preset files, and what is needed to undo it."""

    before: PresetSnapshot
    after: PresetSnapshot
    previous_preset: tuple[str, Recipe] | None
    """If the change saved a preset, (name, recipe) of the preset on which the recipe was based before;
    otherwise None.
    """


class PresetsScreen(WorkerDialog[None], OnQloraApp):
    """A list of the built-in presets and the user's presets, and a preview of what opening the preset under
    the cursor would change.
    """

    CSS_PATH = "presets.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        *_ALWAYS[1:],
        *(command.binding() for command in _COMMANDS),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._undo: list[_PresetChange] = []
        """Changes made since this window was opened, oldest first."""
        self._presets: list[Preset] = []
        self._verdicts: dict[str, Verdict] = {}
        """Verdict on the memory that the recipe would need with each preset, by the preset's name; empty if
        the model is unknown.
        """
        self._filter = ""
        self._forecasts: dict[str, Forecast | None] = {}
        """Forecast of a run with each preset, by the preset's name. The entry for the empty name is the
        forecast for the unchanged recipe. Presets without an entry have not been estimated yet.
        """

    @property
    def current(self) -> Preset | None:
        name = self.query_one(ViList).current
        return next((preset for preset in self._presets if preset.name == name), None)

    def compose(self) -> ComposeResult:
        with Vertical(id="presets-dialog", classes="frame") as dialog:
            dialog.border_title = TITLE_GAP.join(("Presets", dialog_keys(_ALWAYS)))
            dialog.border_subtitle = dialog_keys([command.binding() for command in _SHOWN], "Enter open")
            yield TextField(placeholder="Part of a name or note", compact=True, id="preset-filter")
            with Horizontal():
                yield ViList(id="preset-list")
                with VerticalScroll(id="preview-side", can_focus=False):
                    yield Lines(id="preview")
            with Horizontal(id="save-line"):
                yield Static("Save as ", id="save-label")
                yield TextField(placeholder="name (optionally, name: note)", compact=True, id="save-name")

    def on_mount(self) -> None:
        self.query_one("#save-line").display = False
        self.query_one("#preset-filter").display = False
        self.refresh_list(self.app.workbench.preset)
        self.query_one(ViList).focus()

    def on_option_list_option_highlighted(self) -> None:
        """Show the preview of the preset under the cursor."""
        self._show_preview()

    def on_option_list_option_selected(self) -> None:
        """Open the selected preset, and close the window. The recipe's model and data stay unchanged."""
        if self.current is not None and open_preset(self.app, self.current.name):
            self.dismiss()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show only the presets that match the text typed in the filter."""
        if event.input.id == "preset-filter":
            self._filter = event.value.casefold()
            self._show_list()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """In the filter, move the focus to the list. In the field for a name, save the recipe under the typed
        name.
        """
        if event.input.id == "preset-filter":
            event.input.display = bool(event.value)
            self.query_one(ViList).focus()
            return
        name, _, note = event.value.partition(":")
        if name.strip():
            self._save(name.strip(), note.strip())

    def action_help(self) -> None:
        self.app.push_screen(screen_help(self.app, "presets"))

    def action_leave(self) -> None:
        """Close the field for a name if it is shown; otherwise, the filter if it is shown; otherwise, the
        window.
        """
        line, field = self.query_one("#save-line"), self.query_one("#preset-filter", Input)
        if line.display:
            line.display = False
        elif field.display:
            field.display, field.value = False, ""
        else:
            self.dismiss()
            return
        self.query_one(ViList).focus()

    def action_filter(self) -> None:
        field = self.query_one("#preset-filter", Input)
        field.display = True
        field.focus()

    def action_scroll_preview(self, lines: int) -> None:
        """Scroll the preview down by ``3 * lines`` lines, or up if ``lines`` is negative."""
        self.query_one("#preview-side").scroll_relative(y=3 * lines, animate=False)

    def action_save_as(self) -> None:
        self.query_one("#save-line").display = True
        self.query_one("#save-name", Input).focus()

    def refresh_list(self, select: str | None = None) -> None:
        """Read the presets, and estimate memory and time of a run with each. ``select``: name of the preset
        that gets the cursor; None to leave the cursor on its preset.
        """
        self._presets = list_presets()
        recipe, model = self.app.workbench.recipe, self.app.workbench.architecture()
        opened = {preset.name: preset.recipe(recipe) for preset in self._presets if not preset.problem}
        self._verdicts = {}
        if not isinstance(model, UserError):
            self._verdicts = what_if(opened.items(), model, self.app.memory_budget)
        self._show_list(select)
        self._forecast({"": recipe} | opened)

    def _show_list(self, select: str | None = None) -> None:
        """Show the presets that match the filter. ``select``: name of the preset that gets the cursor; None
        to leave the cursor on its preset.
        """
        current, verdicts = self.app.workbench.preset, self._verdicts
        shown = [p for p in self._presets if self._filter in f"{p.name} {p.note}".casefold()]
        self.query_one(ViList).show(
            lambda width: [(p.name, preset_line(p, current, verdicts.get(p.name), width)) for p in shown],
            select,
        )
        self._show_preview()

    @work(exclusive=True, group="forecasts")
    async def _forecast(self, recipes: dict[str, Recipe]) -> None:
        """Estimate the time of a run of each recipe. ``recipes``: the recipes, by the name of their preset.
        If the data has not been read yet, this takes a moment.
        """
        self._forecasts = {}
        for name, recipe in recipes.items():
            self._forecasts[name] = await asyncio.to_thread(forecast, recipe, self.app.system_status.machine)
            if self.current is not None and name in ("", self.current.name):
                self._show_preview()

    def _show_preview(self) -> None:
        preset, workbench = self.current, self.app.workbench
        if preset is None:
            self.query_one("#preview", Lines).show(Content("No preset matches. Press Esc to show all."))
        else:
            recipe, model = workbench.recipe, workbench.architecture()
            forecasts = (self._forecasts.get(""), self._forecasts.get(preset.name))
            shown = partial(preview, preset, recipe, model, self.app.memory_budget, forecasts)
            self.query_one("#preview", Lines).show(shown)

    def action_delete(self) -> None:
        preset = self.current
        if preset is not None:
            self._remember(delete(preset.name))
            self.notify(f"Deleted {preset.name}. Press {key_name('presets.undo')} here to undo.")
            self.refresh_list()

    @work
    async def action_undo(self) -> None:
        if not self._undo:
            key = key_name("app.undo")
            self.notify(f"No preset was changed here. To undo a change to the recipe, press Esc, then {key}.")
            return
        change = self._undo[-1]
        before = change.before
        # If the file was edited in the meantime, the user is asked before the edit is overwritten.
        is_unchanged = take_snapshot(before.name) == change.after
        if not await write_or_ask(self.app, lambda sure: restore(before, overwrite=sure or is_unchanged)):
            return
        self._undo.pop()
        if change.previous_preset is not None:
            self.app.workbench.undo_saved_as(before.name, change.previous_preset)
            self.app.recipe_edited()
        self.refresh_list(before.name)
        done = "Removed" if before.content is None else "Restored"
        self.notify(f"Undone. {done} your preset {before.name}.")

    def _remember(self, before: PresetSnapshot, previous_preset: tuple[str, Recipe] | None = None) -> None:
        self._undo.append(_PresetChange(before, take_snapshot(before.name), previous_preset))

    def action_edit(self) -> None:
        preset = self.current
        if preset is None:
            return
        try:
            with self.app.suspend():
                tried = self.app.try_or_show_error(lambda: edit(preset))
        except SuspendNotSupported:
            self.notify(
                "This terminal cannot run an editor inside the app. "
                f"Edit the file yourself: {format_path(preset.path)}",
                severity="warning",
            )
            return
        self.refresh_list(preset.name)
        after = self.current
        if tried and after is not None and after.problem is not None:
            self.app.show_error(after.problem)

    def action_import_preset(self) -> None:
        self._ask_path("Import a preset", "Path of a TOML file:", self._import)

    @work
    async def _import(self, path: Path) -> None:
        if await write_or_ask(self.app, lambda sure: self._remember(import_preset(path, overwrite=sure))):
            self.refresh_list(path.stem)
            self.notify(f"Imported {path.stem}. Press {key_name('presets.undo')} here to undo.")

    def action_export_preset(self) -> None:
        if (preset := self.current) is not None:
            title = f"Export {preset.name}"
            self._ask_path(title, "Path of a file or folder:", lambda path: self._export(preset, path))

    @work
    async def _export(self, preset: Preset, target: Path) -> None:
        if await write_or_ask(self.app, lambda sure: export_preset(preset, target, overwrite=sure)):
            file = target / preset.path.name if target.is_dir() else target
            self.notify(f"Exported to {file}.")

    @work
    async def _save(self, name: str, note: str) -> None:
        """Save the recipe as a preset. Ask first if this would replace a preset that was edited outside the
        app, or a preset other than the one on which the recipe is based.
        """
        workbench = self.app.workbench

        def write(sure: bool) -> None:
            before = save_as(name, workbench.recipe, note=note, own=workbench.preset, overwrite=sure)
            self._remember(before, workbench.saved_as(name))

        if await write_or_ask(self.app, write):
            self.app.recipe_edited()
            self.notify(
                f"Saved the settings as {name}, without the model and the data. Use it with "
                f"--preset {shlex.quote(name)}. Press {key_name('presets.undo')} here to undo."
            )
            self.action_leave()
            self.refresh_list(name)

    def _ask_path(self, title: str, words: str, then: Callable[[Path], object]) -> None:
        def on_text(text: str) -> None:
            if text.strip():
                then(Path(text.strip()).expanduser())

        self.ask(TextPromptScreen(title, words), on_text)


def preset_line(preset: Preset, current: str, verdict: Verdict | None, width: int) -> Content:
    """Return the name of a preset and, if there is room, the memory that the recipe would need with it.
    ● marks the preset named ``current``, on which the recipe is based. ✗ marks a preset that cannot be read.
    """
    mark, style = ("● ", "$primary") if preset.name == current else ("  ", "")
    if preset.problem:
        mark, style = "✗ ", "$error"
    line = Content.assemble((mark, style), preset.name, ("" if preset.shipped else "  yours", "$text-muted"))
    if verdict is None or width < _NEED_WIDTH:
        return line
    figures = fit_figure(verdict)
    space = max(1, width - line.cell_length - figures.cell_length)
    return Content.assemble(line, " " * space, figures)


def preview(
    preset: Preset,
    recipe: Recipe,
    architecture: Architecture | UserError,
    budget: MemoryBudget,
    forecasts: tuple[Forecast | None, Forecast | None],
    width: int,
) -> Content:
    """Return the note of a preset, the settings that opening it would change, and memory and time before and
    after. If the preset cannot be read, return the error.

    Args:
        preset: The preset.
        recipe: The current recipe.
        architecture: Architecture of the recipe's model, or why it is unknown.
        budget: The memory limit.
        forecasts: Forecasts of a run of the current recipe, and of a run after opening the preset; None if
            unknown.
        width: Width of a line, in cells.
    """
    if preset.problem:
        return error_content(preset.problem)
    opened = preset.recipe(recipe)
    changes = [change for change in diff_recipes(recipe, opened) if change.path not in DESCRIPTIVE]
    lines = [Content.styled(preset.note or "No note.", "bold")]
    lines += _memory(recipe, opened if changes else None, architecture, budget, width)
    lines += _times(forecasts if changes else forecasts[:1])
    lines.append(Content(""))
    if not changes:
        lines.append(Content("The recipe already matches this preset."))
        rows = [(fields()[path].label, format_value(get_setting(opened, path))) for path in _MAIN]
        return Content("\n").join([*lines, Content(""), *fact_lines(rows, width)])
    number = pluralize(len(changes), "setting")
    lines.append(
        Content.styled(f"Opening this preset changes {number}; model and data stay the same.", "$text-muted")
    )
    names = {change.path: fields()[change.path].label for change in changes}
    labels, paths = max(map(len, names.values())), max(map(len, names))
    for change in changes:
        head = f"{names[change.path]:<{labels}}  " if width >= _LABEL_WIDTH else ""
        path = f"{change.path:<{paths}}  "
        values = Content.assemble((f"{change.before} → ", "$text-muted"), (change.after, "bold"))
        lines += hanging(Content.assemble(head, (path, "$text-muted" if head else "")), values, width)
    return Content("\n").join(lines)


def _memory(
    recipe: Recipe,
    opened: Recipe | None,
    architecture: Architecture | UserError,
    budget: MemoryBudget,
    width: int,
) -> list[Content]:
    """Return lines with the memory of the current recipe and, unless ``opened`` is None, of the recipe after
    opening the preset, compared with the limit.
    """
    if isinstance(architecture, UserError):
        return []
    lines = []
    variants = {"now": recipe} if opened is None else {"now": recipe, "then": opened}
    verdicts = what_if(variants.items(), architecture, budget)
    for label in variants:
        verdict = verdicts.get(label)
        if verdict is None:
            lines.append(
                Content.styled("The model does not have the recipe's target modules.", "$text-muted")
            )
            continue
        head = Content.styled(f"{f'memory {label}':<12} ", "$text-muted")
        fit = FitLine("", verdict, place=place_words(budget))
        lines.append(head + fit.draw(width - head.cell_length, _MAX_BAR))
    return lines


def _times(forecasts: Sequence[Forecast | None]) -> list[Content]:
    """Return lines with the expected time of a run, now and after opening the preset, such as
    ``time then    about 25 min   54 steps``. A last line gives the source of the estimate. A run without a
    forecast has no line.
    """
    lines, source = [], ""
    for label, expected in zip(("now", "then"), forecasts, strict=False):
        if expected is not None:
            duration = expected.duration or "known after the first steps"
            head = (f"{f'time {label}':<12} ", "$text-muted")
            lines.append(Content.assemble(head, duration, (f"   {expected.steps}", "$text-muted")))
            source = expected.time.source if expected.time else ""
    return [*lines, Content.styled(f"{'':<13}{source}", "$text-muted")] if source else lines
