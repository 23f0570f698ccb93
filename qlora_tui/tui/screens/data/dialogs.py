"""Dialogs of the Data screen: files, columns, formats, preferences, and rows by what a run learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Input, Label, OptionList, Static

from qlora_tui.data.excluded_rows import Excluded, RowPlace, is_excluded, without_rows
from qlora_tui.data.formats import parts_of
from qlora_tui.data.sources import AUTO, FormatChoice
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_loss, format_path, truncate_middle
from qlora_tui.recipe.schema import Preferences, Source
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.row_losses import (
    RowClass,
    RowLoss,
    RowLosses,
    token_changes,
)
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.columns import Column, table
from qlora_tui.tui.screens.modals.dialogs import Choice, ListPicker
from qlora_tui.tui.ui_state import Kind, add_recent, recent_paths
from qlora_tui.tui.widgets.controls import TextField, ViList
from qlora_tui.visible import visible

_MAX_ENTRIES = 500
"""Entries of one folder; type to find the others."""
_MAX_RECENT = 6
_PAIRS: dict[Preferences, tuple[str, str]] = {
    "orpo": ("ORPO", "learn the chosen answers, and to prefer them"),
    "dpo": ("DPO", "prefer the chosen answers, near the base model"),
    "simpo": ("SimPO", "as DPO without the base model: shorter steps"),
}
_RATED: dict[Preferences, tuple[str, str]] = {
    "kto": ("KTO", "prefer good answers to bad ones, near the base"),
}
_LINE_WIDTH = 200
"""Cells of a line, which the dialog cuts."""


class FilePickerScreen(ModalScreen[Path | None]):
    """Returns the chosen path; None when closed with Escape."""

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
        is_id: Callable[[str], bool] = lambda text: False,
    ) -> None:
        """``is_id`` tells whether a text is a Hub id, which may be chosen too, rather than a path."""
        super().__init__()
        self._is_id = is_id
        self._title = title
        self._kind = kind
        self._endings = endings
        self._folder = (start or Path.cwd()).resolve()
        self._listed: list[Path] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="open-dialog") as dialog:
            dialog.border_title = self._title
            yield TextField(placeholder="A path, or part of a name", id="path-input", compact=True)
            # Above the list, since notifications may cover the bottom of the screen.
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
        """List the entries that match the typed path."""
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
        """Choose the typed path, or the entry under the cursor."""
        typed = Path(event.value).expanduser()
        if "/" in event.value and typed.is_file():
            self._open(typed.resolve())
        elif (cursor := self.query_one(ViList).highlighted) is not None:
            self._open(self._listed[cursor])
        else:
            self._show_location(f"✗ No name here contains {Path(event.value).name!r}.")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open what was clicked on."""
        self._open(self._listed[event.option_index])

    def action_move(self, by: int) -> None:
        """Move the cursor of the list while the field has the focus."""
        entries = self.query_one(ViList)
        entries.action_cursor_down() if by > 0 else entries.action_cursor_up()

    def action_complete(self) -> None:
        """Put the path under the cursor into the field."""
        cursor = self.query_one(ViList).highlighted
        if cursor is not None:
            path = self._listed[cursor]
            field = self.query_one(Input)
            field.value = f"{format_path(path)}/" if path.is_dir() else format_path(path)
            field.cursor_position = len(field.value)

    def action_choose_folder(self) -> None:
        """Choose the folder shown, with all its files."""
        self._choose(self._folder)

    def _open(self, path: Path) -> None:
        if not path.is_dir():
            self._choose(path)
            return
        self._folder = path
        field = self.query_one(Input)
        if field.value:
            with field.prevent(Input.Changed):
                field.value = ""
        self._list("")

    def _choose(self, path: Path) -> None:
        if path.exists():
            add_recent(self._kind, path)
        self.dismiss(path)

    def _list(self, part: str) -> None:
        self._show_location(format_path(self._folder))
        wanted = part.lower()
        recent_matches = [p for p in recent_paths(self._kind) if wanted in str(p).lower()][:_MAX_RECENT]
        here = [p for p in self._entries() if wanted in p.name.lower()]
        # A name that begins so is likelier meant than one that holds it somewhere.
        here.sort(key=lambda p: not p.name.lower().startswith(wanted))
        lines = [(path, Content.assemble(("recent  ", "dim"), format_path(path))) for path in recent_matches]
        lines += [(path, _entry_line(path)) for path in here]
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
        """The entries of the folder: matching files first, then folders."""
        try:
            entries = sorted(p for p in self._folder.iterdir() if not p.name.startswith("."))
        except OSError as error:
            self._show_location(f"✗ {format_path(self._folder)}: {error.strerror}")
            return []
        files = [p for p in entries if p.name.lower().endswith(self._endings) and p.is_file()]
        return files + [p for p in entries if p.is_dir()]


def _entry_line(path: Path) -> Content:
    """A file with its size, or a folder."""
    if path.is_dir():
        return Content.styled(f"{path.name}/", "bold")
    try:
        size = format_bytes(path.stat().st_size)
    except OSError:
        size = ""
    return Content.assemble(path.name, (f"  {size}", "dim"))


class ColumnMappingScreen(ModalScreen[dict[str, str] | None]):
    """A field for each part of a format; returns the mapping, or None when closed with Escape."""

    CSS_PATH = ["../modals/modal.tcss", "../modals/fields.tcss"]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, format_: str, columns: tuple[str, ...], mapping: dict[str, str]) -> None:
        super().__init__()
        self._format = format_
        self._columns = columns
        self._mapping = mapping

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog", can_focus=False) as dialog:
            dialog.border_title = f"Columns of {self._format}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Tab next", "→ complete", "Enter apply")
            yield Static(f"Columns in the file: {', '.join(self._columns)}", markup=False, classes="muted")
            for part in parts_of(self._format):
                with Horizontal(classes="field"):
                    yield Label(part.replace("_", " "))
                    yield TextField(
                        self._mapping.get(part, ""),
                        name=part,
                        placeholder="none",
                        compact=True,
                        suggester=SuggestFromList(self._columns, case_sensitive=False),
                    )

    def on_input_submitted(self) -> None:
        """Take what the fields say; an empty one leaves the part out."""
        given = {field.name or "": field.value.strip() for field in self.query(Input)}
        self.dismiss({part: column for part, column in given.items() if column})


def format_picker(choices: Sequence[FormatChoice], now: str) -> ListPicker[str]:
    """A dialog that returns the chosen format; ``now`` is the present one."""

    def name(choice: FormatChoice) -> Content:
        name = f"{AUTO}: {choice.detected}" if choice.detected else choice.format
        return Content.styled(name, "bold" if choice.format == now else "")

    columns = (
        Column[FormatChoice](text=_reads),
        Column[FormatChoice](text=name, gap=1),
        Column[FormatChoice](text=lambda choice: f"{choice.read:,} rows", right=True),
        Column[FormatChoice](
            text=lambda choice: "now" if choice.format == now else "", width=3, style="$primary"
        ),
        Column[FormatChoice](text=lambda choice: choice.problem or choice.example, style="dim"),
    )
    return ListPicker(
        f"Format: how the first {choices[0].rows:,} rows are read",
        "read as",
        [
            Choice(choice.format, line.rstrip())
            for choice, line in zip(choices, table(columns, choices, _LINE_WIDTH), strict=True)
        ],
        selected=now,
        is_wide=True,
    )


def _reads(choice: FormatChoice) -> Content:
    """Whether a format reads all rows, some or none."""
    if not choice.read:
        return Content.styled("✗", "$error")
    return Content.styled("✓", "$success") if choice.read == choice.rows else Content.styled("!", "$warning")


def preference_picker(*, rated: bool) -> ListPicker[str]:
    """A dialog that returns a value of ``data.preferences``.

    ``rated``: the answers are rated, not compared in pairs.
    """
    better_only = ("good only" if rated else "chosen only", "train on these answers as if they were all")
    methods: dict[Preferences, tuple[str, str]] = (_RATED if rated else _PAIRS) | {"chosen": better_only}
    choices = [
        Choice[str](method, Content.assemble((f"{name:<12}", "bold"), (text, "dim")))
        for method, (name, text) in methods.items()
    ]
    title = "Good and bad answers" if rated else "Chosen and rejected answers"
    return ListPicker(title, "choose", choices, is_wide=True)


_ROW_SIGNS: dict[RowClass, tuple[str, str]] = {
    "never learned": ("✗", "$error"),
    "contradicting": ("≠", "$warning"),
    "memorized": ("=", "$primary"),
    "learned": ("✓", "$success"),
}
"""Sign and style of each class: the sign says it without color too."""
_MAX_PLACE_WIDTH = 22
"""Cells of a row's number, with the name of its file if the source has several."""


@dataclass(frozen=True)
class MeasuredRows:
    """The losses of a run's rows."""

    run: RunDir
    number: int
    """Number of the source among those of the run."""
    losses: RowLosses

    def token_changes(self, place: RowPlace) -> tuple[tuple[float, float], ...]:
        """Loss before and after of each token in the loss of a row; empty if it was not measured."""
        row = self.losses.row_of(self.number, place)
        return () if row is None else token_changes(self.run, row)

    def queue_without(self, rows: tuple[RowPlace, ...]) -> tuple[RunDir, Source]:
        """Queue the run again without some rows; return the new run and its source. Raises UserError."""
        recipe = self.run.recipe()
        sources = list(recipe.data.sources)
        sources[self.number] = without_rows(sources[self.number], rows)
        data = msgspec.structs.replace(recipe.data, sources=tuple(sources))
        return run_actions.submit(msgspec.structs.replace(recipe, data=data)), sources[self.number]


def newest_run_on(source: Source) -> tuple[RunDir, int] | None:
    """The newest run with an adapter that trained on a source, and the source's number there."""
    path = Path(source.path).expanduser().absolute()
    for run in all_runs():
        if not (run.adapter_dir / "adapter_config.json").is_file():
            continue
        try:
            sources = run.recipe().data.sources
        except UserError:
            continue
        for number, trained in enumerate(sources):
            if Path(trained.path).expanduser().absolute() == path:
                return run, number
    return None


class RowChoice(NamedTuple):
    """What was chosen: a row to look at, or rows to train without."""

    place: RowPlace
    excluded: tuple[RowPlace, ...] = ()


class RowLossScreen(ListPicker[RowChoice]):
    """Returns the row to show, or the rows to leave out; None when closed with Escape."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "mark", "Mark"),
        Binding("x", "exclude", "Queue without"),
    ]

    def __init__(self, losses: RowLosses, source: int, excluded: Excluded) -> None:
        """``source``: rows of this source; ``excluded`` are left out already."""
        self._rows = [row for row in losses.rows if row.source == source]
        self._marked: set[RowPlace] = set()
        self._excluded = excluded
        counts = {name: sum(row.row_class == name for row in self._rows) for name in _ROW_SIGNS}
        words = "  ".join(
            f"{_ROW_SIGNS[name][0]} {count:,} {name}" for name, count in counts.items() if count
        )
        super().__init__(f"Rows of {losses.run}: {words}", "show row", self._listed(), is_wide=True)

    def _listed(self) -> list[Choice[RowChoice]]:
        columns = (
            Column[RowLoss](
                text=lambda row: "●" if row.place in self._marked else " ", style="$primary bold"
            ),
            Column[RowLoss](text=lambda row: Content.assemble(_ROW_SIGNS[row.row_class]), gap=1),
            Column[RowLoss](text=_place, gap=1),
            Column[RowLoss](
                text=lambda row: Content.assemble(
                    ("loss ", "dim"), f"{format_loss(row.before):>6} → {format_loss(row.after):>6}"
                ),
                gap=1,
            ),
            Column[RowLoss](
                text=lambda row: f"other prompt {format_loss(row.other_prompt):>6}", style="dim", gap=1
            ),
            Column[RowLoss](text=self._description),
        )
        lines = table(columns, self._rows, _LINE_WIDTH)
        rows = zip(self._rows, lines, strict=True)
        return [Choice(RowChoice(row.place), line.rstrip()) for row, line in rows]

    def action_mark(self) -> None:
        """Mark the row under the cursor, or take its mark away."""
        if self.current is not None:
            self._marked ^= {self.current.place}
            self.choices = self._listed()
            self.show_choices()
            self.query_one(ViList).action_cursor_down()

    def action_exclude(self) -> None:
        """Train without the marked rows; without marks, without the row under the cursor."""
        places = self._marked or ({self.current.place} if self.current is not None else set())
        if places:
            self.dismiss(RowChoice(min(places), tuple(sorted(places))))

    def _description(self, row: RowLoss) -> Content:
        left_out = "  excluded" if is_excluded(self._excluded, row.place) else ""
        return Content.styled(f"{visible(row.description)}{left_out}", _ROW_SIGNS[row.row_class][1])


def _place(row: RowLoss) -> str:
    return f"row {truncate_middle(visible(str(row.place)), _MAX_PLACE_WIDTH):<6}"
