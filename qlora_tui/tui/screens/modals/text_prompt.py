"""Asks for one line of text: a learning rate, a name, what to search for."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.markup import escape
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.text_field import TextField


class TextPromptScreen(ModalScreen[str | None]):
    """Returns the text; None if cancelled. ``validate`` returns what is wrong, or an empty string."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(
        self, title: str, text: str, value: str = "", validate: Callable[[str], str] = lambda _: ""
    ) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._value = value
        self._validate = validate

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = escape(self._title)
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter apply")
            yield Static(self._text, markup=False)
            yield TextField(self._value, compact=True)
            yield Static("", id="prompt-error", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        wrong = self._validate(event.value)
        if wrong:
            self.query_one("#prompt-error", Static).update(f"✗ {wrong}")
        else:
            self.dismiss(event.value)


def ask_search(app: App[object], things: str, before: str, show: Callable[[str], None]) -> None:
    """Ask for a text, and pass it to ``show``: an empty one shows everything again.

    Args:
        app: The app.
        things: What is searched, in the plural: ``lines``.
        before: The text that was searched for last.
        show: Called unless the question is cancelled.
    """
    text = f"Show only {things} with this text. Leave empty to show all."
    app.push_screen(
        TextPromptScreen("Search", text, before), lambda given: None if given is None else show(given)
    )
