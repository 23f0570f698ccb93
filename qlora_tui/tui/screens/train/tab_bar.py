"""One line of tab names, selected with the mouse or by the screen's keys."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.formatting import truncate_middle
from qlora_tui.tui.widgets.diff_widget import DiffWidget


class TabBar(DiffWidget):
    """``log │ samples 12 │ health !2``. A click runs ``screen.show_tab('<name>')``."""

    DEFAULT_CSS = """
    TabBar {
        height: 1;
        link-style: none;
        link-color: $foreground;
    }
    """

    def __init__(self, names: tuple[str, ...], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.names = names
        self.front = names[0]
        self._notes: dict[str, str] = {}
        self._hint = ""
        self._state = ""

    def show(self, front: str, notes: dict[str, str], hint: str = "", state: str = "") -> None:
        """Select a tab; ``notes`` follow the names, ``state`` and ``hint`` are at the right end.

        If both do not fit, only the state is shown: it says which lines are hidden.
        """
        if (front, notes, hint, state) != (self.front, self._notes, self._hint, self._state):
            self.front, self._notes, self._hint, self._state = front, dict(notes), hint, state
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        parts = []
        for name in self.names:
            note = self._notes.get(name, "")
            text = f" {name}{' ' + note if note else ''} "
            style = "reverse bold" if name == self.front else "dim"
            parts.append(Content.styled(text, style).stylize(f"@click=screen.show_tab('{name}')"))
        line = Content.styled("│", "dim").join(parts)
        width_left = width - line.cell_length - 2
        state = Content.styled(truncate_middle(self._state, width_left), "bold")
        hint = Content.styled(f"  {self._hint}" if self._hint else "", "dim")
        end = state + hint if state.cell_length + hint.cell_length <= width_left else state
        return [line + Content(" " * max(0, width_left - end.cell_length + 1)) + end]
