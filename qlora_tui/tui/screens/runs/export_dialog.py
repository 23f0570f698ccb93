"""Exports of a run: what can be written, where to, and how far earlier exports are."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.markup import escape
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from qlora_tui.catalog.adapters import WEIGHTS
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.chat.chat_types import ADAPTER
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import (
    Export,
    cancel_export,
    delete_export,
    read_exports,
    restart_export,
    start_export,
)
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
from qlora_tui.tui.widgets.controls import HEADING, TextField, ViList

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_READ_INTERVAL_S = 0.5
_EARLIER = "export:"
_TYPE = Binding("t", "type", "Type")
_CHECKPOINT = Binding("c", "checkpoint", "Checkpoint")
_CANCEL = Binding("x", "cancel", "Cancel")
_RESTART = Binding("r", "restart", "Start again")
_DELETE = Binding("D", "delete", "Delete")
_COPY = Binding("y", "copy", "Copy command")
_CLOSE = Binding("escape", "dismiss(None)", "Close")
_STARTED = "Started. It continues when you close this window or the app."


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
    choices = partial(export_choices, architecture, app.memory_budget, _size(adapter))
    final = [None] if ADAPTER in source.adapters else []
    steps = [*final, *(step for step, _ in reversed(run.checkpoints()))]
    app.push_screen(ExportScreen(run, choices, steps))


def _size(adapter: Path) -> int:
    try:
        return (adapter / WEIGHTS).stat().st_size
    except OSError:
        return 0


class ExportScreen(ModalScreen[None]):
    """Starts exports in the background and shows how far they are."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        _TYPE,
        _CHECKPOINT,
        _CANCEL,
        _RESTART,
        _DELETE,
        _COPY,
        _CLOSE,
    ]

    def __init__(
        self, run: RunDir, choices: Callable[..., list[ExportChoice]], steps: Sequence[int | None]
    ) -> None:
        """Create the dialog.

        Args:
            run: Whose adapter is exported.
            choices: Returns what can be written: :func:`export_choices` with a model.
            steps: Of the run's checkpoints, the first to be chosen first; None is the final adapter.
        """
        super().__init__()
        self._run_dir = run
        self._make_choices = choices
        self._chosen_types: dict[str, str] = {}
        self._choices = {choice.id: choice for choice in choices()}
        self._steps = list(steps)
        self._exports: dict[str, Export] = {}
        self._proposed = ""
        """The path that was filled in; another one was typed and is left alone."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide", id="export-dialog") as dialog:
            dialog.border_title = escape(f"Export {self._run_dir.name}")
            yield ViList()
            yield Static("", id="export-detail", markup=False)
            with Horizontal(id="export-target"):
                yield Static("", id="export-label", markup=False)
                yield TextField("", id="export-path", compact=True)
            message = Static("", id="export-message", markup=False)
            message.display = False
            yield message

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

    def action_type(self) -> None:
        """Choose the next type of GGUF files, or what is uploaded next."""
        choice = self._current_choice
        if choice is None or not choice.types:
            self.notify("This form has no types.", severity="warning")
            return
        name = "hub_form" if choice.id == "hub" else "file_type"
        current = self._chosen_types.get(name, choice.types[0])
        self._chosen_types[name] = choice.types[(choice.types.index(current) + 1) % len(choice.types)]
        self._choices = {each.id: each for each in self._make_choices(**self._chosen_types)}
        self._refresh_exports()
        self._show_detail()

    def action_checkpoint(self) -> None:
        """Choose the next older checkpoint, and the final adapter after the oldest."""
        if len(self._steps) == 1:
            self.notify("The run has no other checkpoint.", severity="warning")
            return
        self._steps.append(self._steps.pop(0))
        self._show_detail()

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

    def action_restart(self) -> None:
        """Start the export under the cursor again if it failed or was canceled."""
        export = self._current_export
        if export is None or export.status.state not in ("failed", "canceled"):
            self.notify("Move to a failed or canceled export to start it again.", severity="warning")
            return
        try:
            again = restart_export(self._run_dir, export)
        except UserError as problem:
            self._say(f"✗ {problem}")
            return
        self._say(_STARTED)
        self._refresh_exports(select=again)

    def action_delete(self) -> None:
        """Delete a failed or canceled export from the list, and what a kill left of it."""
        export = self._current_export
        if export is None or export.status.state not in ("failed", "canceled"):
            self.notify("Move to a failed or canceled export to delete it.", severity="warning")
            return
        try:
            delete_export(export)
        except UserError as problem:
            self._say(f"✗ {problem}")
            return
        self._say("Deleted.")
        self._refresh_exports()

    def action_copy(self) -> None:
        """Copy the command that runs an exported file, or its path."""
        export = self._current_export
        if export is None or export.status.state != "finished":
            self.notify("Move to a finished export to copy its command.", severity="warning")
            return
        self.app.copy_to_clipboard(export.status.command or shlex.join(export.status.paths))

    @property
    def _current_choice(self) -> ExportChoice | None:
        return self._choices.get(self.query_one(ViList).current or "")

    @property
    def _current_export(self) -> Export | None:
        return self._exports.get(self.query_one(ViList).current or "")

    def _start(self) -> None:
        choice = self._current_choice
        if choice is None:
            self.action_copy()
            return
        path = self.query_one(TextField).value
        request = request_for(choice, path, self._steps[0])
        if not path.strip():
            self._say(f"✗ Enter a {choice.target.lower()}.")
        elif request.out in self._being_written():
            self._say("✗ This file is being written already.")
        else:
            try:
                export = start_export(self._run_dir, request)
            except UserError as problem:
                self._say(f"✗ {problem}")
                return
            self._say(_STARTED)
            self._proposed = self.query_one(TextField).value
            self._refresh_exports(select=export)
            self.query_one(ViList).focus()

    def _being_written(self) -> set[str]:
        return {e.request.out for e in self._exports.values() if e.status.state == "running"}

    def _refresh_exports(self, *, select: Export | None = None) -> None:
        self._exports = {f"{_EARLIER}{e.folder.name}": e for e in read_exports(self._run_dir)}
        lines = [(choice.id, choice_line(choice)) for choice in self._choices.values()]
        if self._exports:
            lines.append((f"{HEADING}exports", Content.styled("Exports of this run", "bold")))
            lines += [(id_, export_line(export)) for id_, export in self._exports.items()]
        self.query_one(ViList).show(lines, select=_EARLIER + select.folder.name if select else None)
        if self._current_export is not None:
            self._show_detail()

    def _show_detail(self) -> None:
        export, choice = self._current_export, self._current_choice
        text = choice.detail if choice else ""
        if export is not None:
            text = export_detail(export)
        detail = self.query_one("#export-detail", Static)
        if detail.content != text:
            detail.update(text)
        self.query_one("#export-dialog").border_subtitle = self._keys(choice, export)
        self.query_one("#export-target").display = choice is not None
        if choice is not None:
            self._show_target(choice)

    def _show_target(self, choice: ExportChoice) -> None:
        field, step = self.query_one(TextField), self._steps[0]
        label = choice.target if step is None else f"Checkpoint {step:,} · {choice.target}"
        self.query_one("#export-label", Static).update(label)
        if field.value == self._proposed:
            self._proposed = proposed_target(choice, self._run_dir.name, step)
            field.value = self._proposed
            # The end names the file.
            field.cursor_position = len(self._proposed)

    def _keys(self, choice: ExportChoice | None, export: Export | None) -> Content:
        """Return the keys that do something for the line under the cursor."""
        if choice is None:
            state = export.status.state if export else ""
            keys = {"": [], "running": [_CANCEL], "finished": [_COPY]}.get(state)
            if export is not None and keys is None:
                keys = [_RESTART, _DELETE]
            return dialog_keys([*(keys or []), _CLOSE])
        keys = [_TYPE] * bool(choice.types) + [_CHECKPOINT] * (len(self._steps) > 1)
        return dialog_keys([*keys, _CLOSE], "Enter export", f"Tab {choice.target.lower()}")

    def _say(self, text: str) -> None:
        message = self.query_one("#export-message", Static)
        message.update(text)
        message.display = True
