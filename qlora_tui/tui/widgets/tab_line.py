"""One line of names, one of them in front: chosen with the mouse or by the screen's keys."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.tui.widgets.lines import Lines


class TabLine(Lines):
    """``log │ samples 12 │ health !2``. A click runs ``screen.show_tab('<name>')``."""

    DEFAULT_CSS = """
    TabLine {
        height: 1;
        link-style: none;
        link-color: $text-muted;
    }
    """

    def __init__(self, names: tuple[str, ...], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.names = names
        self.front = names[0]
        self._notes: dict[str, str] = {}
        self._hint = ""

    def show(self, front: str, notes: dict[str, str], hint: str = "") -> None:
        """Put one in front; ``notes`` stand behind names, ``hint`` at the right end."""
        if (front, notes, hint) != (self.front, self._notes, self._hint):
            self.front, self._notes, self._hint = front, dict(notes), hint
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        parts = []
        for name in self.names:
            note = self._notes.get(name, "")
            text = f" {name}{' ' + note if note else ''} "
            style = "reverse bold" if name == self.front else "dim"
            parts.append(Content.styled(text, style).stylize(f"@click=screen.show_tab('{name}')"))
        line = Content.styled("│", "dim").join(parts)
        room = width - line.cell_length - 2
        if self._hint and len(self._hint) <= room:
            line += Content(" " * (room - len(self._hint) + 1)) + Content.styled(self._hint, "dim")
        return [line]
