"""The export dialog: the formats to which a run can be exported, the target, and the earlier exports of the
run with their progress.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.markup import escape
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from qlora_tui.catalog.adapters import WEIGHTS
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.gguf import (
    AUTO,
    K_QUANTS,
    bytes_to_run,
    estimated_bytes,
    rows_without_k_blocks,
)
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.chat.chat_types import ADAPTER
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.client import install_hint, is_installed
from qlora_tui.formatting import (
    abbreviate_home,
    format_bytes,
    format_duration,
    format_path,
    join_words,
    truncate_middle,
)
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.remote.calls import refuse_on_box
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import (
    Export,
    ExportRequest,
    Form,
    cancel_export,
    delete_export,
    read_exports,
    restart_export,
    start_export,
)
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.models.model_facts import disk_free_bytes
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
_TYPES = ("Q8_0", "F16", AUTO, "Q4_K_M", "Q5_K_M", "Q6_K")
_NEED_LLAMA_CPP = (AUTO, "Q4_K_M", "Q5_K_M", "Q6_K")
_SIGNS = {"running": ("▸", "$primary"), "finished": ("✓", "$success"), "failed": ("✗", "$error")}
HUB_FORMS = ("adapter", "merged")
"""Forms of a run that can be uploaded to the Hub, besides GGUF files."""
_LINE_WIDTH = 66
"""Width of the line on an export, in cells, so that it fits a window of 80 columns."""


Target: TypeAlias = Literal["File", "Folder", "Name", "Repository"]


_NAMES: tuple[Target, ...] = ("Name", "Repository")


@dataclass(frozen=True)
class ExportChoice:
    """A format to which a run can be exported."""

    id: str
    label: str
    bytes: int | None
    """Size of the export in bytes; None if unknown."""
    note: str
    """What the format is best for, in a few words."""
    detail: str
    """A description, in sentences."""
    form: Form
    is_estimate: bool = True
    """Whether ``bytes`` is computed from the model's parameters. If not, it was read from a file."""
    file_type: str = ""
    suffix: str = ""
    """Ending of the proposed file name."""
    target: Target = "File"
    """Kind of target that the user is asked for."""
    types: tuple[str, ...] = ()
    """Options that a key selects in turn: types of a GGUF file, or forms of an upload; empty if there are
    none.
    """

    @property
    def size(self) -> str:
        """Size to show: an estimate such as ``~7.6 GiB``, an exact size such as ``155 MiB``, or why there is
        none.
        """
        if self.bytes is None:
            return "varies" if self.file_type == AUTO else "unknown"
        return f"{'~' * self.is_estimate}{format_bytes(self.bytes)}"


def show_export_dialog(app: QloraApp, run: RunDir) -> None:
    """Open the export dialog for a run. Raises UserError if the run cannot be exported."""
    refuse_on_box("Exports cannot be started from here", f"export gguf {shlex.quote(run.id)} OUT.gguf")
    source = run_source(run)
    adapter = Path(source.adapters[choose_adapter(source)])
    try:
        architecture = resolve_model(source.recipe.model.id).architecture
    except UserError:
        architecture = None
    choices = partial(export_choices, architecture, app.memory_budget, _size(adapter))
    final = [None] if ADAPTER in source.adapters else []
    steps = [*final, *(step for step, _ in reversed(run.checkpoints()))]
    app.push_screen(ExportScreen(run, choices, steps))


def _size(adapter: Path) -> int | None:
    try:
        return (adapter / WEIGHTS).stat().st_size or None
    except OSError:
        return None


class ExportScreen(ModalScreen[None]):
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
                already given. The dialog passes the type or form that the user has selected.
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
        self._proposed = ""
        """The target that the dialog proposed last. A different text in the field was typed by the user, and
        is therefore kept.
        """

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
        """Describe the format or export under the cursor, and propose a target for a format."""
        self._show_detail()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._start()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._start()

    def action_type(self) -> None:
        """Select the next type of the GGUF file or, for an upload, the next form."""
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
        self._steps.append(self._steps.pop(0))
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
        """Remove the failed or canceled export under the cursor from the list, with any partial files."""
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
        self._say("Started. It continues when you close this window or the app.")
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
        path = self.query_one(TextField).value
        request = request_for(choice, path, self._steps[0])
        if not path.strip():
            self._say(f"✗ Enter a {choice.target.lower()}.")
        elif any(e.request.out == request.out for e in self._exports.values() if e.status.state == "running"):
            self._say("✗ This file is already being written.")
        elif self._try(lambda: self._show_started(start_export(self._run_dir, request))):
            self._proposed = path
            self.query_one(ViList).focus()

    def _refresh_exports(self, *, select: Export | None = None) -> None:
        self._exports = {f"{_EARLIER}{e.folder.name}": e for e in read_exports(self._run_dir)}
        lines = [(f"{HEADING}choices", Content.styled(f"{'Format':<25}{'Size':>10}  Best for", "dim"))]
        lines += [
            (each.id, Content.assemble(f"{each.label:<25}{each.size:>10}  ", (each.note, "dim")))
            for each in self._choices.values()
        ]
        if self._exports:
            lines.append((f"{HEADING}exports", Content.styled("Exports of this run", "bold")))
            lines += [(id_, export_line(export)) for id_, export in self._exports.items()]
        self.query_one(ViList).show(lines, select=_EARLIER + select.folder.name if select else None)
        if self._current_export is not None:
            self._show_detail()

    def _show_detail(self) -> None:
        export, choice = self._current_export, self._current_choice
        text = f"{choice.detail}\n{_free_space(choice)}".rstrip() if choice else ""
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
        keys = [_TYPE] * bool(choice.types) + [_CHECKPOINT] * (len(self._steps) > 1)
        return dialog_keys([*keys, _CLOSE], "Enter export", f"Tab {choice.target.lower()}")

    def _say(self, text: str) -> None:
        message = self.query_one("#export-message", Static)
        message.update(text)
        message.display = True


def export_choices(
    architecture: Architecture | None,
    budget: MemoryBudget,
    adapter_bytes: int | None,
    file_type: str = _TYPES[0],
    hub_form: str = HUB_FORMS[0],
) -> list[ExportChoice]:
    """Return the formats, most useful first. Sizes that depend on an unknown architecture are None.

    Args:
        architecture: Architecture of the base; None if the model is not on this machine.
        budget: Memory in which a GGUF file is meant to run.
        adapter_bytes: Size of the adapter; None if unknown.
        file_type: Type of the GGUF files.
        hub_form: The form to upload: one of :data:`HUB_FORMS`, or the type of a GGUF file.
    """
    types = tuple(kind for kind in _TYPES if is_installed() or kind not in _NEED_LLAMA_CPP)
    merged = None if architecture is None else architecture.total_params * 2
    size, about_type = _size_of_type(file_type, architecture), _about_type(file_type, architecture, budget)
    if is_installed():
        checked = "llama.cpp then compares the file with your adapter's answers."
    else:
        checked = f"Without llama.cpp, files are not checked and smaller types are missing. {install_hint()}"
    uploads: dict[str, tuple[Form, str, int | None]] = {
        "adapter": ("hub-adapter", "the adapter", adapter_bytes),
        "merged": ("hub-merged", "the merged model", merged),
    }
    if hub_form not in uploads:
        uploads[hub_form] = ("hub-gguf", f"GGUF {hub_form}", _size_of_type(hub_form, architecture))
    form, uploaded, uploaded_size = uploads[hub_form]
    return [
        ExportChoice(
            "gguf",
            f"GGUF {file_type}",
            size,
            "llama.cpp, LM Studio",
            f"{checked}{about_type}",
            "gguf",
            file_type=file_type,
            suffix=".gguf" if file_type == AUTO else f"-{file_type}.gguf",
            types=types,
        ),
        ExportChoice(
            "ollama",
            f"Model in Ollama, {file_type}",
            size,
            "chat with `ollama run`",
            "A GGUF file and its Modelfile in ~/models, given to `ollama create` if Ollama is "
            f"installed.{about_type}",
            "ollama",
            file_type=file_type,
            target="Name",
            types=types,
        ),
        ExportChoice(
            "merge",
            "Merged model, 16-bit",
            merged,
            "transformers, vLLM",
            "A folder with base and adapter merged into one model, checked against both before it is kept.",
            "merge",
            suffix="-merged",
            target="Folder",
        ),
        ExportChoice(
            "adapter",
            "Adapter folder",
            adapter_bytes,
            "several adapters in vLLM, peft",
            "A copy of the adapter, checked against what vLLM can serve.",
            "adapter",
            is_estimate=False,
            suffix="-adapter",
            target="Folder",
        ),
        ExportChoice(
            "hub",
            f"Upload {uploaded}",
            uploaded_size,
            "sharing on the Hugging Face Hub",
            "With a model card, to a private repository: name or owner/name. Needs HF_TOKEN or "
            "`hf auth login`.",
            form,
            is_estimate=form != "hub-adapter",
            file_type=hub_form if form == "hub-gguf" else "",
            target="Repository",
            types=(*HUB_FORMS, *types),
        ),
    ]


def _size_of_type(kind: str, architecture: Architecture | None) -> int | None:
    """Return the approximate size in bytes of a GGUF file of this type; None if unknown."""
    return None if architecture is None or kind == AUTO else estimated_bytes(architecture, kind)


def _free_space(choice: ExportChoice) -> str:
    """Return a sentence on the free space on the disk of the proposed folder, as a warning if the export does
    not fit. The text is empty if the free space is unknown, and for uploads.
    """
    free = disk_free_bytes(_folder())
    if free is None or choice.target == "Repository":
        return ""
    room = f"{format_bytes(free)} free for {format_path(_folder())}"
    return f"✗ Only {room}." if choice.bytes is not None and choice.bytes > free else f"{room}."


def _about_type(kind: str, architecture: Architecture | None, budget: MemoryBudget) -> str:
    """Return sentences on the memory that a GGUF file of this type needs, and on what is special about the
    type.
    """
    if kind == AUTO:
        return (
            " auto: the smallest type whose KL divergence from your adapter, as llama.cpp computes it, is at "
            "most 0.03."
        )
    if architecture is None:
        return " Sizes are unknown: the base model is not on this machine."
    needed = bytes_to_run(architecture, kind)
    verb = "Fits" if needed <= budget.bytes else "Does not fit"
    text = f" {verb} {budget.name} at a context of 4,096 tokens (~{format_bytes(needed)})."
    lengths = rows_without_k_blocks(architecture) if kind in K_QUANTS else ()
    if lengths:
        rows = join_words([f"{length:,}" for length in lengths])
        text += f" Rows of {rows} weights are not multiples of 256, so llama.cpp stores them as larger types."
    return text


def _folder() -> Path:
    """Return the folder in which exports are proposed."""
    return Path.home() / "models"


def proposed_target(choice: ExportChoice, run_name: str, checkpoint: int | None = None) -> str:
    """Return an unused path in the folder for exports or, if the choice needs a name, a name derived from
    ``run_name``. ``checkpoint``: step of the checkpoint; None for the final adapter.
    """
    stem = re.sub(r"[^\w.-]+", "-", run_name).strip("-") or "adapter"
    if checkpoint is not None:
        stem += f"-step-{checkpoint}"
    if choice.target in _NAMES:
        return stem.lower()
    folder = _folder()
    path, number = folder / f"{stem}{choice.suffix}", 2
    while path.exists():
        path = folder / f"{stem}-{number}{choice.suffix}"
        number += 1
    return format_path(path)


def request_for(choice: ExportChoice, out: str, checkpoint: int | None = None) -> ExportRequest:
    """Return the request for an export. ``out``: the target as the user typed it. ``checkpoint``: step of the
    checkpoint; None for the final adapter.
    """
    is_name = choice.target in _NAMES
    target = out.strip() if is_name else str(Path(out.strip()).expanduser().absolute())
    return ExportRequest(form=choice.form, out=target, file_type=choice.file_type, checkpoint=checkpoint)


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
    """Return sentences on the state and the result of an earlier export."""
    status = export.status
    match status.state:
        case "finished":
            paths = ", ".join(map(abbreviate_home, status.paths))
            size = format_bytes(status.bytes)
            run_it = f"▸ {status.command}" if status.command else ""
            return "\n".join(filter(None, (f"{size} in {paths}", status.summary, run_it)))
        case "running":
            return "\n".join(filter(None, (status.activity, status.note)))
        case "failed":
            written = f"Written: {', '.join(map(abbreviate_home, status.paths))}" if status.paths else ""
            return "\n".join(filter(None, (status.problem, written, status.summary)))
        case "canceled" if status.paths:
            return f"The export was already complete when it was canceled: {', '.join(status.paths)}"
        case "canceled":
            return "The export was canceled and left no files."
