"""Commands for the recipe's sources: add or remove a source, change how it is read, choose validation
data.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from textual import work
from textual.actions import SkipAction
from textual.content import Content

from qlora_tui.data.dataset_report import Report
from qlora_tui.data.sources import AUTO, is_hub_dataset
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.formatting import format_bytes, format_number
from qlora_tui.recipe.fields import source_fields
from qlora_tui.recipe.schema import Source
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.data.dialogs import ColumnMappingScreen, format_picker
from qlora_tui.tui.screens.data.row_engines import DataPreviews
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen
from qlora_tui.tui.screens.modals.file_picker import FilePickerScreen
from qlora_tui.tui.ui_state import add_recent

_DATA_ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md"),
    *(".gz", ".zst", ".zstd"),
)


class SourceActions(WorkScreen):
    """Base of the Data screen, with the commands for the recipe's sources. One of the sources is selected."""

    def __init__(self) -> None:
        super().__init__()
        self.previews = DataPreviews()
        self.source_number = 0
        """Index of the selected source in the recipe."""
        self.report: Report | None = None
        """Report on the part of the selected source that has been read; None before the first report."""
        self._unreadable_source: Source | None = None
        """The last requested source, if it could not be read; otherwise None."""
        self._fields: dict[str, str] = {}
        """An example value for each column of a file in an unknown format, by the column's name. The user can
        map these columns.
        """
        self._mapping_format = "prompt-completion"
        """The format for which the user maps the columns of an unreadable source. It is used only if the
        source's format is set to ``auto``.
        """

    @property
    def source(self) -> Source | None:
        """The selected source; None if the recipe has no sources."""
        sources = self.app.workbench.recipe.data.sources
        return sources[self.source_number] if sources else None

    @property
    def _selected(self) -> Source:
        """The selected source. Raises SkipAction if the recipe has no sources."""
        if self.source is None:
            raise SkipAction
        return self.source

    def action_open(self, replaces: bool = False) -> None:
        """Ask for a file, a folder or a Hub dataset. The answer replaces all sources if ``replaces``;
        otherwise it is added to the sources.
        """
        sources = self.app.workbench.recipe.data.sources
        folder = Path(sources[-1].path).expanduser().parent if sources else None
        start = folder if folder is not None and folder.is_dir() else None
        title = "Train on other data" if replaces else "Add data" if sources else "Open data"

        def opened(path: Path) -> None:
            if path.exists():
                add_recent("data", path)
            (self._replace_sources if replaces else self.add_source)(path)

        self.ask(FilePickerScreen(title, "data", _DATA_ENDINGS, start, is_id=is_hub_dataset), opened)

    def _replace_sources(self, path: Path) -> None:
        """Make this path the only source of the recipe."""
        sources = self.app.workbench.recipe.data.sources
        self._set_only_source(path)
        if sources:
            names = Path(sources[0].path).name if len(sources) == 1 else f"{len(sources)} files"
            self.notify_undoable(f"Replaced {names} with {path.name}.")

    def add_source(self, path: Path) -> None:
        """Add a path to the sources, and select it.

        If the selected source cannot be read, the path replaces it, because no run could start with an
        unreadable source. If the only source is the demo's data, the path replaces it too.
        """
        sources = self.app.workbench.recipe.data.sources
        if [Path(source.path) for source in sources] == [CONVERSATIONS] and path != CONVERSATIONS:
            self._set_only_source(path)
            self.notify_undoable("Replaced the demo's data.")
            return
        selected = self.source
        if selected is not None and selected == self._unreadable_source:
            self._change_source(Source(path=str(path)))
            if selected.path != str(path):
                self.notify_undoable(f"Replaced {Path(selected.path).name}.")
            return
        self.source_number = len(sources)
        self.app.edit("data.sources", (*sources, Source(path=str(path))))
        if sources:
            self.notify(
                f"Added {path.name}: the recipe trains on {len(sources) + 1} files. "
                f"Press {key_name('app.undo')} to undo, {key_name('data.replace')} to replace files."
            )

    def _set_only_source(self, path: Path) -> None:
        self.source_number = 0
        self.app.edit("data.sources", (Source(path=str(path)),))

    def _change_source(self, source: Source) -> None:
        """Replace the selected source in the recipe with ``source``."""
        sources = list(self.app.workbench.recipe.data.sources)
        sources[self.source_number] = source
        self.app.edit("data.sources", tuple(sources))

    def action_remove(self) -> None:
        """Remove the selected source from the recipe."""
        source, sources = self._selected, list(self.app.workbench.recipe.data.sources)
        del sources[self.source_number]
        self.app.edit("data.sources", tuple(sources))
        self.notify_undoable(f"Removed {Path(source.path).name}.")

    def action_weight(self) -> None:
        """Ask for the weight of the selected source. The weight says how often the source's rows are
        repeated.
        """
        source = self._selected
        field = source_fields()["weight"]

        def validate(text: str) -> str:
            try:
                msgspec.convert(float(text), field.type)
            except (ValueError, msgspec.ValidationError):
                return f"{field.expected}."
            return ""

        title = f"Weight of {Path(source.path).name}"
        prompt = TextPromptScreen(title, field.help, format_number(source.weight), validate)
        self.ask(
            prompt, lambda text: self._change_source(msgspec.structs.replace(source, weight=float(text)))
        )

    @work(exclusive=True, group="formats")
    async def action_format(self) -> None:
        """Ask for the format in which the rows are read. The dialog says how many rows each format can
        read.
        """
        source = self._selected
        preferences = self.app.workbench.recipe.data.preferences
        choices = await self.previews.formats(source, preferences)
        format_ = await self.app.push_screen_wait(format_picker(choices, source.format))
        if format_ is not None and format_ != source.format:
            self._change_source(msgspec.convert(msgspec.to_builtins(source) | {"format": format_}, Source))
            self.notify_undoable("Format detected." if format_ == AUTO else f"Read as {format_}.")

    def action_columns(self) -> None:
        """Ask which columns of the file have the prompt, the answer, and so on."""
        source = self._selected
        if self.report is not None and self.report.files:
            file = self.report.files[0]
            screen = ColumnMappingScreen(file.format, file.all_columns, {**file.columns, **source.columns})
        elif self._fields:
            format_ = self._mapping_format if source.format == "auto" else source.format
            screen = ColumnMappingScreen(format_, tuple(self._fields), source.columns)
        else:
            self.notify("Columns cannot be mapped until the file can be read.")
            return
        self.ask(
            screen, lambda columns: self._change_source(msgspec.structs.replace(source, columns=columns))
        )

    def action_validation(self) -> None:
        """Ask for validation data: a fraction of the rows, or the path of a file."""
        data = self.app.workbench.recipe.data

        def validate(text: str) -> str:
            if _share(text) is not None or Path(text).expanduser().exists():
                return ""
            return "Enter a share below 1, or the path of an existing file."

        def apply(text: str) -> None:
            share = _share(text)
            if share is None:
                self.app.edit("data.validation_path", str(Path(text).expanduser().resolve()))
            else:
                self.app.edit("data.validation_path", "")
                self.app.edit("data.validation_fraction", share)

        help_ = "A share of the rows, such as 0.05 (0 for none), or the path of a validation file."
        now = data.validation_path or format_number(data.validation_fraction)
        self.ask(TextPromptScreen("Validation", help_, now, validate), apply)


def source_line(source: Source, alone: bool) -> Content:
    """Return the line of a source in the list: its name, size and weight. ``alone``: whether there is no
    other source. If so, a weight of 1 is left out.
    """
    path = Path(source.path)
    weight = "" if alone and source.weight == 1 else f"  weight {format_number(source.weight)}"
    if is_hub_dataset(source.path):
        return Content.assemble(source.path, ("  hub", "dim"), (weight, "bold"))
    try:
        size = "folder" if path.is_dir() else format_bytes(path.stat().st_size)
    except OSError:
        size = "missing"
    return Content.assemble(path.name, (f"  {size}", "dim"), (weight, "bold"))


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share < 1 else None
