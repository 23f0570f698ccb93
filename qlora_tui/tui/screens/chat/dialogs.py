"""The dialogs of the chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Label, Static, TextArea

from qlora_tui.chat.chat_types import Sampling
from qlora_tui.formatting import format_loss, uncapitalize
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui import clock
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import Dialog
from qlora_tui.tui.screens.chat.saved import SavedConversation, conversation_line, format_setting
from qlora_tui.tui.screens.modals.dialogs import Choice, ListPicker
from qlora_tui.tui.widgets.controls import OwnKeysFirst, TextField

_HELP = {
    "temperature": "0: only the most likely token",
    "top_p": "cumulative probability limit",
    "top_k": "most likely tokens kept; 0: all",
    "repetition_penalty": "above 1: less repetition",
    "max_new_tokens": "longest answer, in tokens",
    "seed": "empty: a random seed each time",
}
_LABELS = {"top_p": "top-p", "top_k": "top-k", "max_new_tokens": "max tokens"}
_LINE_WIDTH = 70
"""Width of a line in the list of conversations, in cells."""


class AnswerArea(OwnKeysFirst, TextArea):
    """A field with several lines, in which Enter starts a new line and Ctrl+S saves."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+s", "screen.save", show=False)]


class AnswerEditor(Dialog[str | None]):
    """Dialog that returns the edited answer; None if the user canceled, or if the answer is unchanged or
    empty.
    """

    CSS_PATH = "../modals/modal.tcss"
    DEFAULT_CSS = """
    AnswerEditor AnswerArea, AnswerEditor AnswerArea:focus {
        height: 14;
        border: none;
        background: $surface;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save"),
        Binding("escape", "dismiss(None)", "Cancel"),
    ]

    def __init__(self, adapter_name: str, answer: str) -> None:
        super().__init__()
        self._adapter_name = adapter_name
        self._answer = answer

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = f"Edit the answer of {self._adapter_name}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static("Write the answer as it should have been. It is saved as training data.")
            area = AnswerArea(self._answer, soft_wrap=True, show_line_numbers=False, tab_behavior="focus")
            area.cursor_blink = False
            yield area

    def on_mount(self) -> None:
        area = self.query_one(AnswerArea)
        area.focus()
        area.move_cursor(area.document.end)

    def action_save(self) -> None:
        """Close the dialog with the text if the text was changed and is not empty; otherwise, close the
        dialog with None.
        """
        text = self.query_one(AnswerArea).text.strip()
        self.dismiss(text if text and text != self._answer else None)


class ChatSettingsScreen(Dialog[tuple[Sampling, str] | None]):
    """Dialog that returns the sampling settings and the system prompt; None if the user pressed Escape."""

    CSS_PATH = ["../modals/modal.tcss", "../modals/fields.tcss", "sampling_settings.tcss"]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "apply", "Apply", priority=True),
        Binding("ctrl+r", "earlier_prompt", "Earlier prompt", priority=True),
        Binding("escape", "dismiss(None)", "Close"),
    ]

    def __init__(self, sampling: Sampling, system_prompt: str, earlier_prompts: Sequence[str] = ()) -> None:
        super().__init__()
        self._earlier_prompts = [prompt for prompt in earlier_prompts if prompt != system_prompt]
        self._sampling = sampling
        self._system_prompt = system_prompt

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog", can_focus=False) as dialog:
            dialog.border_title = "Sampling"
            keys = self.BINDINGS if self._earlier_prompts else (self.BINDINGS[0], self.BINDINGS[-1])
            dialog.border_subtitle = dialog_keys(keys, "Tab next", "Enter apply")
            yield Label("system prompt")
            system = TextArea(self._system_prompt, id="system", soft_wrap=True, tab_behavior="focus")
            system.cursor_blink = False
            yield system
            for name, value in msgspec.structs.asdict(self._sampling).items():
                with Horizontal(classes="field"):
                    yield Label(_LABELS.get(name, name.replace("_", " ")))
                    yield TextField("" if value is None else format_setting(value), name=name, compact=True)
                    yield Static(_HELP[name], classes="muted help", markup=False)
            yield Static("", id="settings-error", markup=False)

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    def on_input_submitted(self) -> None:
        """Apply the settings when Enter is pressed in a number field."""
        self.action_apply()

    def action_earlier_prompt(self) -> None:
        """Replace the system prompt with the next prompt in the list of earlier prompts. After the last one,
        restore the text that was in the field at first.
        """
        if self._earlier_prompts:
            field = self.query_one(TextArea)
            self._earlier_prompts.append(field.text.strip())
            field.text = self._earlier_prompts.pop(0)

    def action_apply(self) -> None:
        """If all fields are valid, close the dialog and return the settings; otherwise show what is wrong."""
        given = {field.name or "": field.value.strip() for field in self.query(Input)}
        try:
            numbers: dict[str, Any] = {name: _number(name, text) for name, text in given.items()}
            sampling = msgspec.convert(numbers, Sampling)
        except (ValueError, msgspec.ValidationError) as error:
            self.query_one("#settings-error", Static).update(f"✗ {_words(error)}")
            return
        self.dismiss((sampling, self.query_one(TextArea).text.strip()))


def _number(name: str, text: str) -> float | int | None:
    if not text and name == "seed":
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{_LABELS.get(name, name.replace('_', ' '))} must be a number.") from None
    return int(value) if value.is_integer() else value


def _words(error: Exception) -> str:
    """Return a readable message for an error in a field. msgspec's own message looks like ``Expected `float`
    <= 5.0 - at `$.temperature` ``.
    """
    text = str(error)
    what, _, where = text.partition(" - at `$.")
    if not where:
        return text
    name = where.rstrip("`")
    return f"{_LABELS.get(name, name.replace('_', ' '))}: {uncapitalize(what).replace('`', '')}."


def chat_runs() -> list[RunDir]:
    """Return every run that has an adapter or a checkpoint, newest first."""
    return [
        run for run in all_runs() if (run.adapter_dir / "adapter_config.json").exists() or run.checkpoints()
    ]


def source_picker(runs: list[RunDir], model: str) -> ListPicker[str]:
    """Return a dialog for choosing what to chat with. The dialog returns the id of a run or, for the recipe's
    model, ``model``. If ``model`` is empty, the recipe's model is not listed.
    """
    choices = [Choice(run.id, _line(run), run.id) for run in runs]
    if model:
        name = model.rstrip("/").rpartition("/")[2]
        line = Content.assemble(name, ("  the recipe's model, without an adapter", "dim"))
        choices.append(Choice(model, line, "base"))
    return ListPicker("Chat with", "select", choices)


def _line(run: RunDir) -> Content:
    status = read_status(run)
    loss = f", loss {format_loss(status.loss)}" if status.loss is not None else ""
    checkpoints = len(run.checkpoints())
    more = f", {checkpoints} checkpoint{'s' if checkpoints != 1 else ''}" if checkpoints else ""
    return Content.assemble(
        (run.name, "bold"), (f"\n  {status.state} at step {status.step:,}{loss}{more}", "dim")
    )


def conversation_picker(conversations: Sequence[tuple[Path, SavedConversation]]) -> ListPicker[Path]:
    """Return a dialog for choosing a saved conversation. The dialog returns the file of the conversation.

    The dialog's filter also searches the messages.
    """
    now, choices = clock.now(), []
    for path, saved in conversations:
        answers = (answer.text for turn in saved.turns for answer in turn.answers.values())
        said = "\n".join((*(turn.prompt for turn in saved.turns), *answers))
        choices.append(Choice(path, conversation_line(saved, now, _LINE_WIDTH), said))
    return ListPicker("Saved conversations", "open", choices, is_wide=True)
