"""Keys of the Data screen that add, replace and remove sources."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qlora_tui.data.sources import is_hub_dataset
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.recipe.fields import source_fields
from qlora_tui.recipe.schema import Source
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.data.file_picker import FilePickerScreen
from qlora_tui.tui.screens.data.row_actions import RowActions
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen

DATA_ENDINGS = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt",
    ".text",
    ".md",
    ".gz",
    ".zst",
    ".zstd",
)


class SourceActions(RowActions):
    """A screen with the recipe's sources, one of which is selected."""

    source_number = 0
    unreadable_source: Source | None = None
    """The source that was read last, if nothing of it could be read."""

    def action_open(self, replaces: bool = False) -> None:
        """Add a file, a folder or a dataset of the hub to the sources, or train on it alone."""
        sources = self.qlora_app.workbench.recipe.data.sources
        start = Path(sources[-1].path).expanduser().parent if sources else None
        known = start if start is not None and start.is_dir() else None
        title = "Train on other data" if replaces else "Add data" if sources else "Open data"
        screen = FilePickerScreen(title, "data", DATA_ENDINGS, known, is_hub_dataset)
        self.app.push_screen(screen, self.replace_sources if replaces else self.add_source)

    def action_weight(self) -> None:
        """Ask how often the rows of the source are seen."""
        source = self.source()
        if source is None:
            return

        def validate(text: str) -> str:
            field = source_fields()["weight"]
            try:
                msgspec.convert(float(text), field.type)
            except (ValueError, msgspec.ValidationError):
                return f"{field.expected}."
            return ""

        def on_result(text: str | None) -> None:
            if text is not None:
                self.change_source(msgspec.structs.replace(source, weight=float(text)))

        title = f"Weight of {Path(source.path).name}"
        help_ = source_fields()["weight"].help
        self.app.push_screen(TextPromptScreen(title, help_, f"{source.weight:g}", validate), on_result)

    def action_remove(self) -> None:
        """Remove the selected source from the recipe."""
        source = self.source()
        if source is None:
            return
        sources = list(self.qlora_app.workbench.recipe.data.sources)
        del sources[self.source_number]
        self.qlora_app.edit("data.sources", tuple(sources))
        self.notify(f"Removed {Path(source.path).name}. Press {key_name('app.undo')} to undo.")

    def source(self) -> Source | None:
        """The selected source."""
        sources = self.qlora_app.workbench.recipe.data.sources
        return sources[self.source_number] if sources else None

    def add_source(self, path: Path | None) -> None:
        """Add the path that the file picker returned to the sources, and select it.

        It replaces a selected source that cannot be read, with which no run could start, and the demo's data
        if that is the only source.
        """
        if path is None:
            return
        sources = self.qlora_app.workbench.recipe.data.sources
        if [Path(source.path) for source in sources] == [CONVERSATIONS] and path != CONVERSATIONS:
            self.source_number = 0
            self.qlora_app.edit("data.sources", (Source(path=str(path)),))
            self.notify(f"Replaced the demo's data. Press {key_name('app.undo')} to undo.")
            return
        gone = self.source()
        if gone is not None and gone == self.unreadable_source:
            self.change_source(Source(path=str(path)))
            if gone.path != str(path):
                self.notify(f"Replaced {Path(gone.path).name}. Press {key_name('app.undo')} to undo.")
            return
        self.source_number = len(sources)
        self.qlora_app.edit("data.sources", (*sources, Source(path=str(path))))
        if sources:
            self.notify(
                f"Added {path.name}: the recipe trains on {len(sources) + 1} files. "
                f"Press {key_name('app.undo')} to undo, {key_name('data.replace')} to replace files."
            )

    def replace_sources(self, path: Path | None) -> None:
        """Train on the path that the file picker returned, and on nothing else."""
        if path is None:
            return
        sources = self.qlora_app.workbench.recipe.data.sources
        self.source_number = 0
        self.qlora_app.edit("data.sources", (Source(path=str(path)),))
        if sources:
            names = Path(sources[0].path).name if len(sources) == 1 else f"{len(sources)} files"
            self.notify(f"Replaced {names} by {path.name}. Press {key_name('app.undo')} to undo.")

    def change_source(self, source: Source) -> None:
        """Replace the selected source in the recipe."""
        sources = list(self.qlora_app.workbench.recipe.data.sources)
        sources[self.source_number] = source
        self.qlora_app.edit("data.sources", tuple(sources))
