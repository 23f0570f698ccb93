"""The file browser: move through folders, type a path with completion, or pick a recent path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static

from qlora_tui.formatting import format_bytes, format_path
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import Dialog
from qlora_tui.tui.ui_state import Kind, recent_paths
from qlora_tui.tui.widgets.controls import TextField, ViList

_MAX_ENTRIES = 500
"""Maximum number of a folder's entries to list. To list other entries, the user types a part of a name."""
_MAX_RECENT = 6


class FilePickerScreen(Dialog[Path | None]):
    """File browser that returns the selected path; None if closed with Escape."""

    CSS_PATH = "file_picker.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o", "choose_folder", "Open folder"),
        Binding("escape", "dismiss(None)", "Close"),
        Binding("down", "move(1)", show=False, priority=True),
        Binding("up", "move(-1)", show=False, priority=True),
        Binding("tab", "complete", show=False, priority=True),
    ]

    def __init__(
        self,
        title: str,
        kind: Kind,
        endings: tuple[str, ...],
        start: Path | None = None,
        *,
        is_id: Callable[[str], bool] = lambda text: False,
        is_one: Callable[[Path], bool] = lambda folder: False,
    ) -> None:
        """Create the file browser.

        Args:
            title: Title of the dialog.
            kind: Kind of the recent paths that are offered.
            endings: File name endings; files whose names end differently are not listed.
            start: The folder in which to start; None for the current folder.
            is_id: Returns whether a text is an id on the Hub. If so, the dialog returns the id as a path.
            is_one: Returns whether a folder counts as one item, such as a model. If so, Enter selects the
                folder instead of opening it.
        """
        super().__init__()
        self._is_id = is_id
        self._is_one = is_one
        self._title = title
        self._kind = kind
        self._endings = endings
        self._folder = (start or Path.cwd()).resolve()
        self._listed: list[Path] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="open-dialog", classes="frame") as dialog:
            dialog.border_title = self._title
            yield TextField(placeholder="A path, or part of a name", id="path-input", compact=True)
            # The keys are above the list, since notifications may cover the bottom of the screen.
            yield Static(
                dialog_keys(self.BINDINGS, "↑↓ select", "Enter open", "Tab complete"),
                id="keys",
                markup=False,
            )
            yield Static(id="location", markup=False)
            yield ViList(id="entries")

    def on_mount(self) -> None:
        self._list("")
        self.query_one(Input).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """List the entries that match the typed path or the typed part of a name. If the typed text is the id
        of a Hub model, list only this id.
        """
        text = event.value
        if self._is_id(text) and not Path(text).expanduser().parent.is_dir():
            self._show_location("Not a local path. Enter loads it from the Hub.")
            self._listed = [Path(text)]
            entries = self.query_one(ViList)
            entries.show([("id", Content.assemble(("hub  ", "dim"), text))])
            entries.highlighted = 0
            return
        if "/" in text or text.startswith("~"):
            typed = Path(text).expanduser()
            parent = typed if text.endswith("/") or text == "~" else typed.parent
            if parent.is_dir():
                self._folder = parent.resolve()
            text = "" if parent == typed else typed.name
        self._list(text)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close the dialog with the typed path if it is a file, or a folder that counts as one item.
        Otherwise, open or select the entry under the cursor.
        """
        typed = Path(event.value).expanduser()
        if "/" in event.value and (typed.is_file() or self._is_one(typed)):
            self.dismiss(typed.resolve())
        elif (cursor := self.query_one(ViList).highlighted) is not None:
            self._open(self._listed[cursor])
        else:
            self._show_location(f"✗ No name here contains {Path(event.value).name!r}.")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """If the selected entry is a folder, open the folder, unless it counts as one item, such as a model.
        In all other cases, close the dialog with the entry's path.
        """
        self._open(self._listed[event.option_index])

    def action_move(self, by: int) -> None:
        """Move the cursor of the list down (``by`` > 0) or up, while the field keeps the focus."""
        entries = self.query_one(ViList)
        entries.action_cursor_down() if by > 0 else entries.action_cursor_up()

    def action_complete(self) -> None:
        """Replace the text in the field with the path under the cursor."""
        cursor = self.query_one(ViList).highlighted
        if cursor is not None:
            path = self._listed[cursor]
            field = self.query_one(Input)
            field.value = f"{format_path(path)}/" if path.is_dir() else format_path(path)
            field.cursor_position = len(field.value)

    def action_choose_folder(self) -> None:
        """Close the dialog with the folder whose entries are listed. The folder stands for all its files."""
        self.dismiss(self._folder)

    def _open(self, path: Path) -> None:
        if not path.is_dir() or self._is_one(path):
            self.dismiss(path)
            return
        self._folder = path
        field = self.query_one(Input)
        if field.value:
            with field.prevent(Input.Changed):
                field.value = ""
        self._list("")

    def _list(self, part: str) -> None:
        self._show_location(format_path(self._folder))
        wanted = part.lower()
        recent_matches = [p for p in recent_paths(self._kind) if wanted in str(p).lower()][:_MAX_RECENT]
        here = [p for p in self._entries() if wanted in p.name.lower()]
        # Names that begin with the typed text come first.
        here.sort(key=lambda p: not p.name.lower().startswith(wanted))
        lines = [(path, Content.assemble(("recent  ", "dim"), format_path(path))) for path in recent_matches]
        lines += [(path, self._entry_line(path)) for path in here]
        if not part and self._folder.parent != self._folder:
            lines.append((self._folder.parent, Content.styled("../", "dim")))
        self._listed = [path for path, _ in lines[:_MAX_ENTRIES]]
        entries = self.query_one(ViList)
        entries.clear_options()
        entries.show([(str(number), line) for number, (_, line) in enumerate(lines[:_MAX_ENTRIES])])
        entries.highlighted = 0 if self._listed else None

    def _show_location(self, words: str) -> None:
        self.query_one("#location", Static).update(words)

    def _entries(self) -> list[Path]:
        """Return the entries of the current folder: first the files with an accepted extension, then the
        folders. Hidden entries are left out.
        """
        try:
            entries = sorted(p for p in self._folder.iterdir() if not p.name.startswith("."))
        except OSError as error:
            self._show_location(f"✗ {format_path(self._folder)}: {error.strerror}")
            return []
        files = [p for p in entries if p.name.lower().endswith(self._endings) and p.is_file()]
        return files + [p for p in entries if p.is_dir()]

    def _entry_line(self, path: Path) -> Content:
        """Return the line of an entry. For a folder that Enter opens, the line has the name and a slash; for
        any other entry, the name and the size.
        """
        if path.is_dir() and not self._is_one(path):
            return Content.styled(f"{path.name}/", "bold")
        try:
            size = format_bytes(
                sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
            )
        except OSError:
            size = ""
        return Content.assemble(path.name, (f"  {size}", "dim"))
