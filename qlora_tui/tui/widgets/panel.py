"""A titled region of a screen: the one kind of frame that every screen is built from (``docs/design.md``)."""

from __future__ import annotations

from collections.abc import Sequence

from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.tui.key_names import bare_key, command_key, pressable

_ARROWS = {"Left": "←", "Right": "→", "Up": "↑", "Down": "↓"}


class Panel(Vertical):
    """Its title is in the upper border, the keys for what it shows in the lower one.

    Below 100 × 30 cells (``breakpoints``) the border is only a line with the title (``app.tcss``):
    panels are then one below the other, and the footer has the keys. The panel whose contents have the focus
    has a brighter border; a double one without colors.
    """

    DEFAULT_CSS = """
    Panel {
        height: auto;
        padding: 0 1;
        border: round $border-blurred;
        border-title-color: $primary;
        border-title-style: bold;
        border-subtitle-color: $text-muted;
        &:focus-within {
            border: round $border;
        }
        &:nocolor:focus-within {
            border: double $border;
        }
    }
    """

    def __init__(
        self,
        title: str | Content,
        *children: Widget,
        keys: Sequence[tuple[str, str]] = (),
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        """``keys``: ids of commands with a verb for each, shown in the lower border: ``x other run``."""
        super().__init__(*children, id=id, classes=classes)
        self._keys: tuple[tuple[str, str], ...] = ()
        self._title = Content()
        self.show_title(title)
        self.show_keys(keys)

    def show_title(self, title: str | Content) -> None:
        """Change the title; a string is plain text, in which brackets are nothing special."""
        content = title if isinstance(title, Content) else Content(title)
        if not content.is_same(self._title):  # equal text can differ in its style
            self.border_title = self._title = content

    def show_keys(self, keys: Sequence[tuple[str, str]]) -> None:
        """Change the keys in the lower border."""
        if tuple(keys) != self._keys:
            self._keys = tuple(keys)
            if self.is_attached:
                self._show_subtitle()

    def on_mount(self) -> None:
        self._show_subtitle()

    def _show_subtitle(self) -> None:
        # Only now: the user's keymap is that of the app that runs.
        hints = [
            hint.stylize("$footer-key-foreground bold", 0, hint.plain.index(" "))
            for hint in (_hint(command, verb) for command, verb in self._keys)
        ]
        self.border_subtitle = Content("  ").join(hints) if hints else None


def _hint(command: str, verb: str) -> Content:
    """``x other run``, on which a click presses the key."""
    shown = bare_key(command)
    return pressable(f"{_ARROWS.get(shown, shown)} {verb}", command_key(command))


class ModelProblem(Static):
    """In place of a screen's content: what is wrong with the recipe's model; hidden while nothing is."""

    DEFAULT_CSS = """
    ModelProblem {
        height: auto;
        padding: 1 2;
        color: $text-muted;
    }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)

    def show(self, problem: UserError | None) -> None:
        """Show a problem; None hides the widget."""
        self.display = problem is not None
        if problem is not None:
            self.update("\n".join(filter(None, (problem.what, problem.why, f"▸ {problem.fix}"))))
