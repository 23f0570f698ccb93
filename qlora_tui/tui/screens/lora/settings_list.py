"""The adapter's settings as a list: Left and Right step the one under the cursor."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from qlora_tui.tui.widgets.controls import ViList


class SettingsList(ViList):
    """Lines with the path of a setting as their id."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l", "step(1)", show=False),
        Binding("left,h", "step(-1)", show=False),
    ]

    class Stepped(Message):
        """The user wants the next or the previous value of a setting."""

        def __init__(self, path: str, direction: int) -> None:
            super().__init__()
            self.path = path
            self.direction = direction

    def action_step(self, direction: int) -> None:
        """Ask for another value of the setting under the cursor."""
        if self.current is not None:
            self.post_message(self.Stepped(self.current, direction))

    def action_select(self) -> None:
        """Step it upwards."""
        self.action_step(1)

    def select_setting(self, path: str) -> None:
        """Put the cursor on a setting."""
        paths = [option.id for option in self.options]
        if path in paths:
            self.highlighted = paths.index(path)
