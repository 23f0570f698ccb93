"""Exports of a run: what can be written, where to, and how far earlier exports are."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.markup import escape
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from qlora_tui.catalog.adapter_config import WEIGHTS
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import Export, cancel_export, read_exports, start_export
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.runs.export_choices import (
    ExportChoice,
    choice_line,
    export_choices,
    export_detail,
    export_line,
    proposed_target,
    request_for,
)
from qlora_tui.tui.widgets.static_update import update_if_changed
from qlora_tui.tui.widgets.text_field import TextField
from qlora_tui.tui.widgets.vi_list import HEADING, ViList

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_READ_INTERVAL_S = 0.5
_EARLIER = "export:"


def show_export_dialog(app: QloraApp, run: RunDir) -> None:
    """Open the dialog, or say why the run cannot be exported."""
    try:
        source = run_source(run)
        adapter = Path(source.adapters[choose_adapter(source)])
    except UserError as problem:
        app.show_error(problem)
        return
    try:
        architecture = resolve_model(source.recipe.model.id).architecture
    except UserError:
        architecture = None
    app.push_screen(ExportScreen(run, export_choices(architecture, app.memory_budget, _size(adapter))))


def _size(adapter: Path) -> int:
    try:
        return (adapter / WEIGHTS).stat().st_size
    except OSError:
        return 0


class ExportScreen(ModalScreen[None]):
    """Starts exports in the background and shows how far they are."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "cancel", "Cancel"),
        Binding("y", "copy", "Copy command"),
        Binding("escape", "dismiss(None)", "Close"),
    ]

    def __init__(self, run: RunDir, choices: list[ExportChoice]) -> None:
        super().__init__()
        self._run_dir = run
        self._choices = {choice.id: choice for choice in choices}
        self._exports: dict[str, Export] = {}
        self._proposed = ""
        """The path that was filled in; another one was typed and is left alone."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = escape(f"Export {self._run_dir.name}")
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter export", "Tab path")
            yield ViList()
            yield Static("", id="export-detail", markup=False)
            yield TextField("", id="export-path", compact=True)
            yield Static("", id="export-message", markup=False)

    def on_mount(self) -> None:
        self.query_one(ViList).focus()
        self._refresh_exports()
        self.set_interval(_READ_INTERVAL_S, self._refresh_exports)

    def on_option_list_option_highlighted(self) -> None:
        """Describe what is under the cursor, and propose a path."""
        self._show_detail()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._start()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._start()

    def action_cancel(self) -> None:
        """Cancel the export under the cursor."""
        export = self._current_export
        if export is None or export.status.state != "running":
            self.notify("Move to a running export to cancel it.", severity="warning")
            return
        try:
            cancel_export(export)
        except UserError as problem:
            self._say(f"✗ {problem.what} {problem.fix}")

    def action_copy(self) -> None:
        """Copy the command that runs an exported file, or its path."""
        export = self._current_export
        if export is None or export.status.state != "finished":
            self.notify("Move to a finished export to copy its command.", severity="warning")
            return
        self.app.copy_to_clipboard(export.status.command or shlex.join(export.status.paths))

    @property
    def _current_export(self) -> Export | None:
        return self._exports.get(self.query_one(ViList).current or "")

    def _start(self) -> None:
        choice = self._choices.get(self.query_one(ViList).current or "")
        if choice is None:
            self.action_copy()
            return
        if not choice.is_available:
            self._say(f"✗ {choice.detail}")
            return
        path = self.query_one(TextField).value
        request = request_for(choice, path)
        if not path.strip():
            self._say("✗ Enter the file to write.")
        elif request.out in self._being_written():
            self._say("✗ This file is being written already.")
        else:
            try:
                start_export(self._run_dir, request)
            except (UserError, OSError) as error:
                self._say(f"✗ {error}")
                return
            self._say("Started. It continues when you close this window or the app.")
            self._refresh_exports()
            self._show_detail(propose_again=True)

    def _being_written(self) -> set[str]:
        return {e.request.out for e in self._exports.values() if e.status.state == "running"}

    def _refresh_exports(self) -> None:
        self._exports = {f"{_EARLIER}{e.folder.name}": e for e in read_exports(self._run_dir)}
        lines = [(choice.id, choice_line(choice)) for choice in self._choices.values()]
        if self._exports:
            lines.append((f"{HEADING}exports", Content.styled("Exports of this run", "bold")))
            lines += [(id_, export_line(export)) for id_, export in self._exports.items()]
        self.query_one(ViList).show(lines)
        if self._current_export is not None:
            self._show_detail()

    def _show_detail(self, *, propose_again: bool = False) -> None:
        export = self._current_export
        choice = self._choices.get(self.query_one(ViList).current or "")
        field = self.query_one(TextField)
        text = choice.detail if choice else ""
        if export is not None:
            text = export_detail(export)
        update_if_changed(self.query_one("#export-detail", Static), Content(text))
        field.display = choice is not None
        if choice is not None and (propose_again or field.value == self._proposed):
            self._proposed = proposed_target(choice, self._run_dir.name)
            field.value = self._proposed
            # The end names the file.
            field.cursor_position = len(self._proposed)

    def _say(self, text: str) -> None:
        self.query_one("#export-message", Static).update(text)
