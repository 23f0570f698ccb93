"""The window with sampling settings and the system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static, TextArea

from qlora_tui.chat.chat_types import Sampling
from qlora_tui.formatting import uncapitalize
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.chat.transcript import format_setting
from qlora_tui.tui.widgets.controls import TextField

_HELP = {
    "temperature": "0: only the most likely token",
    "top_p": "cumulative probability limit",
    "top_k": "most likely tokens; 0: all",
    "repetition_penalty": "above 1: less repetition",
    "max_new_tokens": "longest answer, in tokens",
    "seed": "empty: a random one each time",
}
_LABELS = {"top_p": "top-p", "top_k": "top-k", "max_new_tokens": "max tokens"}


class ChatSettingsScreen(ModalScreen[tuple[Sampling, str] | None]):
    """Gives sampling and system prompt; None when closed with Escape."""

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
        """Enter in any of the figures."""
        self.action_apply()

    def action_earlier_prompt(self) -> None:
        """Put in the next of the system prompts used before, and at last the present one again."""
        if self._earlier_prompts:
            field = self.query_one(TextArea)
            self._earlier_prompts.append(field.text.strip())
            field.text = self._earlier_prompts.pop(0)

    def action_apply(self) -> None:
        """Apply the fields if they are valid, or else show what is wrong."""
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
    """Rewrite msgspec's ``Expected `float` <= 5.0 - at `$.temperature` `` for users."""
    text = str(error)
    what, _, where = text.partition(" - at `$.")
    if not where:
        return text
    name = where.rstrip("`")
    return f"{_LABELS.get(name, name.replace('_', ' '))}: {uncapitalize(what).replace('`', '')}."
