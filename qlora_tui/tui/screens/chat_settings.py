"""How the chat answers: sampling and system prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from qlora_tui.chat.terms import Sampling

_HELP = {
    "temperature": "temperature: 0 always takes the likeliest token",
    "top_p": "top p: only the likeliest tokens that together have this probability",
    "top_k": "top k: only so many of the likeliest tokens; 0 is all",
    "repetition_penalty": "repetition penalty: above 1, less of what was said already",
    "max_new_tokens": "most new tokens",
    "seed": "seed: the same answer again; empty is another each time",
}


class ChatSettingsScreen(ModalScreen[tuple[Sampling, str]]):
    """Gives sampling and system prompt; None when closed with Escape."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, sampling: Sampling, system_prompt: str) -> None:
        super().__init__()
        self._sampling = sampling
        self._system_prompt = system_prompt

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="card") as card:
            card.border_title = "How to answer"
            card.border_subtitle = "enter takes them · esc closes"
            yield Label("system prompt")
            yield Input(self._system_prompt, name="system", compact=True)
            for name, value in msgspec.structs.asdict(self._sampling).items():
                yield Label(_HELP[name])
                yield Input("" if value is None else f"{value:g}", name=name, compact=True)
            yield Static("", id="wrong", classes="fix")

    def on_input_submitted(self) -> None:
        """Take the fields if they are right, else say what is wrong."""
        given = {field.name or "": field.value.strip() for field in self.query(Input)}
        system_prompt = given.pop("system")
        try:
            numbers: dict[str, Any] = {name: _number(text) for name, text in given.items()}
            sampling = msgspec.convert(numbers, Sampling)
        except (ValueError, msgspec.ValidationError) as error:
            self.query_one("#wrong", Static).update(f"✗ {error}")
            return
        self.dismiss((sampling, system_prompt))


def _number(text: str) -> float | int | None:
    if not text:
        return None
    value = float(text)
    return int(value) if value.is_integer() else value
