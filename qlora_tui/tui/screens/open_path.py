"""Choosing a file or folder: type a path, or walk there; recent ones first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.format import size
from qlora_tui.tui.recent import recent, remember

_SHOWN = 500
"""Entries of one folder; type to find the others."""


class OpenPathScreen(ModalScreen[Path]):
    """Gives the path chosen; None when closed with Escape."""

    CSS_PATH = "open_path.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("ctrl+o", "choose_folder", "Choose this folder"),
        Binding("down", "to_list", show=False),
    ]

    def __init__(self, title: str, kind: str, endings: tuple[str, ...], start: Path | None = None) -> None:
        super().__init__()
        self._title = title
        self._kind = kind
        self._endings = endings
        self._folder = (start or Path.cwd()).resolve()
        self._listed: list[Path] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="open-card") as card:
            card.border_title = self._title
            card.border_subtitle = "type or walk · enter opens · ^o takes this folder · esc closes"
            yield Input(placeholder="a path, or the beginning of a name", id="typed")
            yield Static(id="where", markup=False)
            yield OptionList(id="entries")

    def on_mount(self) -> None:
        self._list("")
        self.query_one(Input).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Walk along with what is typed."""
        text = event.value
        if "/" in text or text.startswith("~"):
            folder = Path(text).expanduser()
            parent = folder if text.endswith("/") else folder.parent
            if parent.is_dir():
                self._folder = parent.resolve()
            text = "" if text.endswith("/") else folder.name
        self._list(text)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take the path typed, or the first of the list."""
        typed = Path(event.value).expanduser()
        if event.value and typed.exists():
            self._take(typed.resolve())
        elif self._listed:
            self._take(self._listed[0])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open what was chosen."""
        self._take(self._listed[event.option_index])

    def action_to_list(self) -> None:
        """From the field into the list."""
        self.query_one(OptionList).focus()

    def action_choose_folder(self) -> None:
        """Take the folder shown, all its files together."""
        self._leave_with(self._folder)

    def _take(self, path: Path) -> None:
        if not path.is_dir():
            self._leave_with(path)
            return
        self._folder = path
        field = self.query_one(Input)
        field.value = ""
        self._list("")

    def _leave_with(self, path: Path) -> None:
        remember(self._kind, path)
        self.dismiss(path)

    def _list(self, beginning: str) -> None:
        self.query_one("#where", Static).update(str(self._folder))
        options = self.query_one(OptionList)
        options.clear_options()
        wanted = beginning.lower()
        lately = [p for p in recent(self._kind) if wanted in str(p).lower()]
        here = [p for p in self._entries() if p.name.lower().startswith(wanted)]
        self._listed = [*lately, *([] if beginning else [self._folder.parent]), *here][:_SHOWN]
        options.add_options(Option(line) for line in self._lines(lately))
        options.highlighted = 0 if self._listed else None

    def _lines(self, lately: list[Path]) -> Iterable[Content]:
        for n, path in enumerate(self._listed):
            if n < len(lately):
                yield Content.assemble(("recent  ", "dim"), str(path))
            elif path == self._folder.parent:
                yield Content("../")
            elif path.is_dir():
                yield Content(f"{path.name}/")
            else:
                yield Content.assemble(path.name, (f"  {size(path.stat().st_size)}", "dim"))

    def _entries(self) -> list[Path]:
        try:
            entries = [p for p in self._folder.iterdir() if not p.name.startswith(".")]
        except OSError:
            return []
        folders = sorted(p for p in entries if p.is_dir())
        return folders + sorted(p for p in entries if p.name.lower().endswith(self._endings) and p.is_file())
