"""The export dialog: the formats to which a run can be exported, the target, and the run's exports so far,
with the progress of unfinished ones.
"""

from __future__ import annotations

import asyncio
import math
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.markup import escape
from textual.widgets import Input, OptionList, Static

from qlora_tui.catalog.adapters import WEIGHTS
from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.chat.chat_types import ADAPTER
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    abbreviate_home,
    format_bytes,
    format_duration,
    format_loss,
    truncate_middle,
)
from qlora_tui.remote.calls import refuse_on_box
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import (
    Export,
    cancel_export,
    delete_export,
    read_exports,
    restart_export,
    start_export,
)
from qlora_tui.runs.result_weights import better_checkpoint, is_notably_above, summary_weights
from qlora_tui.runs.run_summary import RunSummary, summarize
from qlora_tui.tui.key_names import dialog_keys, highlight_keys
from qlora_tui.tui.render.columns import hanging
from qlora_tui.tui.screens.base import Dialog
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen
from qlora_tui.tui.screens.runs.export_formats import (
    Base,
    ExportChoice,
    base_of,
    describe_choice,
    export_choices,
    free_space,
    proposed_target,
    request_for,
)
from qlora_tui.tui.widgets.controls import HEADING, Lines, TextField, ViList

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
_SIGNS = {"running": ("●", "$primary"), "finished": ("✓", "$success"), "failed": ("✗", "$error")}
_LABEL = 12
"""Width of the labels, in cells."""
_LINE_WIDTH = 66
"""Width of an export's line, in cells. It fits a window of 80 columns."""


def show_export_dialog(app: QloraApp, run: RunDir) -> None:
    """Open the export dialog for a run. Raises UserError if the run cannot be exported."""
    refuse_on_box("Exports cannot be started from here", f"export gguf {shlex.quote(run.id)} OUT.gguf")
    source = run_source(run)
    adapter = Path(source.adapters[choose_adapter(source)])
    choices = partial(export_choices, base_of(run), app.memory_budget, _size(adapter))
    final = [None] if ADAPTER in source.adapters else []
    steps = [*final, *(step for step, _ in reversed(run.checkpoints()))]
    app.push_screen(ExportScreen(run, choices, steps))


def _size(adapter: Path) -> int | None:
    try:
        return (adapter / WEIGHTS).stat().st_size or None
    except OSError:
        return None


class ExportScreen(Dialog[None]):
    """Dialog that starts exports in the background and shows their progress."""

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
            run: The run whose adapter is exported.
            choices: Returns the formats to offer: :func:`export_choices` with its first three arguments
                already given. The dialog adds the GGUF type and the upload form that the user has
                selected.
            steps: Steps of the run's checkpoints, in the order in which a key selects them; None stands for
                the final adapter.
        """
        super().__init__()
        self._run_dir = run
        self._make_choices = choices
        self._chosen_types: dict[str, str] = {}
        self._choices = {choice.id: choice for choice in choices()}
        self._steps = list(steps)
        self._exports: dict[str, Export] = {}
        self._summary: RunSummary | None = None
        self._has_chosen_step = False
        self._starts_when_read = False
        """Whether the user asked for the export before it was known which weights to propose."""
        self._proposed = ""
        """The target that the dialog proposed last. If the field contains a different text, the user typed
        it, and it is kept.
        """

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide", id="export-dialog") as dialog:
            dialog.border_title = escape(f"Export {self._run_dir.name}")
            yield ViList()
            yield Static("", id="export-detail", markup=False)
            yield Lines(id="export-weights")
            with Horizontal(id="export-target"):
                yield Static("", id="export-label", markup=False)
                yield TextField("", id="export-path", compact=True)
            yield Lines(id="export-disk")
            message = Static("", id="export-message", markup=False)
            message.display = False
            yield message

    def on_mount(self) -> None:
        self.query_one(ViList).focus()
        self._read_result()
        self._refresh_exports()
        self.set_interval(_READ_INTERVAL_S, self._refresh_exports)

    @work
    async def _read_result(self) -> None:
        """Find the best step by reading the run's summary, which takes a moment for a long run. If the last
        weights are notably worse, select the checkpoint of the best step, unless the user has selected
        a checkpoint.
        """
        self._summary = await asyncio.to_thread(summarize, self._run_dir)
        better = better_checkpoint(self._summary, [step for step in self._steps if step is not None])
        if better is not None and not self._has_chosen_step:
            self._select_step(better)
        self._show_detail()
        if self._starts_when_read:
            self._start()

    def _select_step(self, step: int | None) -> None:
        at = self._steps.index(step)
        self._steps = self._steps[at:] + self._steps[:at]

    def on_option_list_option_highlighted(self) -> None:
        """Describe the format or export under the cursor, and propose a target for a format."""
        self._show_detail()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._start()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._start()

    def action_type(self) -> None:
        """Select the next type of the GGUF file or, for an upload, the next form of the upload."""
        choice = self._current_choice
        if choice is None or not choice.types:
            self.notify("This format has no types to choose from.", severity="warning")
            return
        name = "hub_form" if choice.id == "hub" else "file_type"
        current = self._chosen_types.get(name, choice.types[0])
        self._chosen_types[name] = choice.types[(choice.types.index(current) + 1) % len(choice.types)]
        self._choices = {each.id: each for each in self._make_choices(**self._chosen_types)}
        self._refresh_exports()
        self._show_detail()

    def action_checkpoint(self) -> None:
        """Select the next older checkpoint. After the oldest, select the final adapter or, if there is none,
        the newest checkpoint.
        """
        if len(self._steps) == 1:
            self.notify("The run has no other checkpoint.", severity="warning")
            return
        self._has_chosen_step = True
        self._select_step(self._steps[1])
        self._show_detail()

    def action_cancel(self) -> None:
        """Cancel the running export under the cursor."""
        export = self._export_in("running", "Move to a running export to cancel it.")
        if export is not None:
            self._try(lambda: cancel_export(export))

    def action_restart(self) -> None:
        """Restart the failed or canceled export under the cursor."""
        export = self._export_in("failed canceled", "Move to a failed or canceled export to start it again.")
        if export is not None:
            self._try(lambda: self._show_started(restart_export(self._run_dir, export)))

    def action_delete(self) -> None:
        """Delete the failed or canceled export under the cursor, together with its partial files."""
        export = self._export_in("failed canceled", "Move to a failed or canceled export to delete it.")
        if export is not None and self._try(lambda: delete_export(export)):
            self._say("Deleted.")
            self._refresh_exports()

    def action_copy(self) -> None:
        """Copy the command that runs the exported file. If the export has no such command, copy the paths of
        its files.
        """
        export = self._export_in("finished", "Move to a finished export to copy its command.")
        if export is not None:
            self.app.copy_to_clipboard(export.status.command or shlex.join(export.status.paths))

    def _export_in(self, states: str, otherwise: str) -> Export | None:
        """Return the export under the cursor if it is in one of these states. Otherwise, show ``otherwise``
        and return None. ``states``: names separated by spaces.
        """
        export = self._current_export
        if export is not None and export.status.state in states.split():
            return export
        self.notify(otherwise, severity="warning")
        return None

    def _try(self, act: Callable[[], object]) -> bool:
        """Call ``act``, and return whether it succeeded. If it raises UserError, show the error in the
        dialog.
        """
        try:
            act()
        except UserError as problem:
            self._say(f"✗ {problem}")
            return False
        return True

    def _show_started(self, export: Export) -> None:
        self._say("")
        self._refresh_exports(select=export)

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
        if choice.missing_base is not None:
            self._get_base(choice.missing_base)
            return
        if self._summary is None:
            self._starts_when_read = True
            return
        path = self.query_one(TextField).value
        request = request_for(choice, path, self._steps[0])
        if not path.strip():
            self._say(f"✗ Enter a {choice.target.lower()}.")
        elif any(e.request.out == request.out for e in self._exports.values() if e.status.state == "running"):
            self._say("✗ This file is already being written.")
        elif self._try(lambda: self._show_started(start_export(self._run_dir, request))):
            self._proposed = path
            self.query_one(ViList).focus()

    def _get_base(self, base: Base) -> None:
        """Ask whether to switch to the Model screen and download the base model. If it cannot be downloaded,
        say why instead.
        """
        from qlora_tui.tui.screens.models.screen import show_download

        def download(answer: bool | None) -> None:
            if answer:
                self.dismiss()
                self.app.call_later(show_download, self.app, base.id)

        if not base.can_download:
            self._say(f"✗ {base.refusal}")
            return
        size = f" ~{format_bytes(base.merged_bytes)}" if base.merged_bytes else ""
        text = (
            f"The Model screen will open and download {base.id}{size} from the Hugging Face Hub. Export "
            f"again afterwards."
        )
        question = ConfirmScreen("Download the base model?", text, "Download", harmless=True)
        self.app.push_screen(question, download)

    def _refresh_exports(self, *, select: Export | None = None) -> None:
        self._exports = {f"{_EARLIER}{e.folder.name}": e for e in read_exports(self._run_dir)}
        write = partial(list_lines, tuple(self._choices.values()), dict(self._exports))
        self.query_one(ViList).show(write, select=_EARLIER + select.folder.name if select else None)
        if self._current_export is not None:
            self._show_detail()

    def _show_detail(self) -> None:
        export, choice = self._current_export, self._current_choice
        is_blocked = choice is not None and choice.missing_base is not None
        text = describe_choice(choice) if choice else ""
        if export is not None:
            text = export_detail(export)
        detail = self.query_one("#export-detail", Static)
        if detail.content != text:
            detail.update(text)
        self.query_one("#export-dialog").border_subtitle = self._keys(choice, export)
        for part in ("#export-weights", "#export-target", "#export-disk"):
            self.query_one(part).display = choice is not None and not is_blocked
        if choice is not None:
            self._show_target(choice)

    def _show_target(self, choice: ExportChoice) -> None:
        field, step = self.query_one(TextField), self._steps[0]
        self.query_one("#export-label", Static).update(_label(choice.target.lower()))
        weights = weights_line(self._summary, step, self._steps)
        self.query_one("#export-weights", Lines).show(partial(hanging, _label("weights"), weights))
        disk = free_space(choice)
        self.query_one("#export-disk", Lines).show(_label("disk") + disk if disk else disk)
        if field.value == self._proposed:
            self._proposed = proposed_target(choice, self._run_dir.name, step)
            field.value = self._proposed
            # Scroll to the end of the path, since the end has the name of the file.
            field.cursor_position = len(self._proposed)

    def _keys(self, choice: ExportChoice | None, export: Export | None) -> Content:
        """Return the keys that are available for the format or export under the cursor."""
        if choice is None:
            state = export.status.state if export else ""
            keys = {"": [], "running": [_CANCEL], "finished": [_COPY]}.get(state)
            if export is not None and keys is None:
                keys = [_RESTART, _DELETE]
            return dialog_keys([*(keys or []), _CLOSE])
        if (base := choice.missing_base) is not None:
            return dialog_keys([_CLOSE], *["Enter download the base"] * base.can_download)
        keys = [_TYPE] * bool(choice.types) + [_CHECKPOINT] * (len(self._steps) > 1)
        return dialog_keys([*keys, _CLOSE], "Enter export", f"Tab {choice.target.lower()}")

    def _say(self, text: str) -> None:
        message = self.query_one("#export-message", Static)
        message.update(text)
        message.display = bool(text)


def _label(name: str) -> Content:
    return Content.styled(f"{name:<{_LABEL}}", "dim")


def weights_line(summary: RunSummary | None, step: int | None, saved: Collection[int | None] = ()) -> Content:
    """Return the step whose weights are exported, compared with the best step or, if it is the best, with the
    last step: ``step 640 (best), validation 1.342; the last step has 1.518``.

    The line has the color of a warning if the validation loss is notably lower at another step. The line says
    so if the best step is no longer saved. If a saved checkpoint is better than the exported step, the line
    also has the best of the saved checkpoints, and the key that selects it.

    Args:
        summary: Summary of the run; None until it has been read.
        step: Step of the checkpoint to export; None for the final adapter.
        saved: Steps of the saved checkpoints, and None for the final adapter.
    """
    if summary is None:
        return Content("")
    text = summary_weights(summary, step)
    if step is None and summary.ended_early:
        return Content(text)
    at = summary.step if step is None else step
    losses, style = dict(summary.evaluations), ""
    if at in losses:
        text += f", validation {format_loss(losses[at])}"
    if summary.best is not None and summary.evaluations:
        lowest, best = summary.best
        last, loss_at_last = summary.evaluations[-1]
        if best != at:
            style = "$warning" if at in losses and is_notably_above(losses[at], lowest) else ""
            text += f"; best {format_loss(lowest)} at step {best:,}"
            text += "" if best in saved else ", which is no longer saved"
            known = {each: losses[each] for each in saved if each is not None and each in losses}
            better = min(known, key=lambda each: known[each], default=at)
            if better != at and known[better] < losses.get(at, math.inf):
                found = "" if better == best else f", {format_loss(known[better])}"
                offer = highlight_keys(f" ▸ [{_CHECKPOINT.key}] step {better:,}{found}")
                return Content.styled(f"{text}.", style) + offer
        else:
            text += f"; the last step has {format_loss(loss_at_last)}" if last != at else ""
    return Content.styled(text, style)


def list_lines(
    choices: Sequence[ExportChoice], exports: Mapping[str, Export], width: int
) -> list[tuple[str, Content]]:
    """Return (id, line) for each line of the list: headings, formats, and earlier exports.

    The last column gives the size of the download that a format needs first, or says that the base model is
    missing.
    """
    head = Content.styled(f"{'Format':<25}{'Size':>10}  Best for", "dim")
    needs = [each.blocked for each in choices]
    is_download = any(each.missing_base is not None and each.missing_base.can_download for each in choices)
    title = "Download" if is_download else ""
    cells = max(map(len, (title, *needs)))
    room = max(0, width - cells - 2) if cells else width
    lines = [(f"{HEADING}choices", _with_last(head, Content.styled(title.rjust(cells), "dim"), room))]
    for each, need in zip(choices, needs, strict=True):
        line = Content.assemble(f"{each.label:<25}{each.size:>10}  ", (each.note, "dim"))
        style = "$error" if need.startswith("✗") else ""
        lines.append((each.id, _with_last(line, Content.styled(need.rjust(cells), style), room)))
    if exports:
        lines.append((f"{HEADING}exports", Content.styled("Exports of this run", "bold")))
        lines += [(id_, export_line(export)) for id_, export in exports.items()]
    return lines


def _with_last(line: Content, last: Content, room: int) -> Content:
    """Return ``line``, padded or cut to ``room`` cells, followed by ``last``, the text of the last column. If
    ``last`` is blank, return ``line`` unchanged.
    """
    return line.truncate(room, ellipsis=True, pad=True) + "  " + last if last.plain.strip() else line


def export_line(export: Export, width: int = _LINE_WIDTH) -> Content:
    """Return a line of at most ``width`` cells with the state and the result of an earlier export."""
    status = export.status
    sign, style = _SIGNS.get(status.state, ("·", "dim"))
    elapsed = f" · {format_duration(time.time() - status.began)}" if status.began else ""
    said = {
        "running": f"{status.activity}{elapsed}",
        "finished": f"{format_bytes(status.bytes)}  {status.verdict or abbreviate_home(export.request.out)}",
        "failed": status.problem.partition("\n")[0],
        "canceled": "canceled",
    }[status.state]
    begin = f"{export.name}  "
    return Content.assemble(
        (f"{sign} ", style), begin, (truncate_middle(said, max(8, width - len(sign) - 1 - len(begin))), "dim")
    )


def export_detail(export: Export) -> str:
    """Return sentences about the state and the result of an earlier export."""
    status = export.status
    match status.state:
        case "finished":
            paths = ", ".join(map(abbreviate_home, status.paths))
            size = format_bytes(status.bytes)
            run_it = f"▸ {status.command}" if status.command else ""
            return "\n".join(filter(None, (f"{size} in {paths}", status.summary, run_it)))
        case "running":
            continues = "The export continues when you close this window or the app."
            return "\n".join(filter(None, (status.activity, status.note, continues)))
        case "failed":
            written = f"Written: {', '.join(map(abbreviate_home, status.paths))}" if status.paths else ""
            return "\n".join(filter(None, (status.problem, written, status.summary)))
        case "canceled" if status.paths:
            return f"The export was already complete when it was canceled: {', '.join(status.paths)}"
        case "canceled":
            return "The export was canceled and left no files."
