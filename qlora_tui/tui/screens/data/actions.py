"""What the keys of the Data screen do to the recipe; those that go from row to row are in ``row_actions``."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from pathlib import Path

import msgspec

from qlora_tui.data.read import COLUMNAR, files_of, kind_of
from qlora_tui.data.sources import is_hub_dataset, readable_formats
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import source_fields
from qlora_tui.recipe.schema import Source
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.data.column_mapping import ColumnMappingScreen
from qlora_tui.tui.screens.data.file_picker import FilePickerScreen
from qlora_tui.tui.screens.data.row_actions import RowActions
from qlora_tui.tui.screens.modals.confirm import ConfirmScreen
from qlora_tui.tui.screens.modals.text_prompt import TextPromptScreen

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
_VIEWS = ("both", "figures", "sample")


class DataActions(RowActions):
    """A screen with a selected source, which keys change."""

    source_number = 0
    fields: dict[str, str] = {}  # noqa: RUF012
    """Columns of a file in no known format, for the mapping by hand."""
    can_use_chosen = False
    """Whether the source is refused for its preferences, and the recipe can take the chosen answers."""
    mapping_format = "prompt-completion"
    """The format to map columns for if ``unreadable_source`` has the format ``auto``."""
    unreadable_source: Source | None = None
    """The source that was read last, if nothing of it could be read."""

    @abstractmethod
    def show_report(self) -> None:
        """Show lengths and problems again."""

    @abstractmethod
    def reload(self) -> None:
        """Read the source again."""

    def action_open(self) -> None:
        """Add a file, a folder or a dataset of the hub to the sources."""
        sources = self.qlora_app.workbench.recipe.data.sources
        start = Path(sources[-1].path).expanduser().parent if sources else None
        known = start if start is not None and start.is_dir() else None
        screen = FilePickerScreen("Open data", "data", DATA_ENDINGS, known, is_hub_dataset)
        self.app.push_screen(screen, self.add_source)

    def action_reload(self) -> None:
        """Read the source again, whether it changed or not."""
        if self.source() is not None:
            self.reload()
            self.notify("Reading the data again.")

    async def action_format(self) -> None:
        """Read the rows in the next format that fits them, or in any where no format was detected."""
        source = self.source()
        if source is None:
            return
        choices = source_fields()["format"].choices
        preferences = self.qlora_app.workbench.recipe.data.preferences
        fitting = await asyncio.to_thread(_fitting_formats, source, preferences)
        start = choices.index(source.format) + 1
        following = next(
            one
            for one in (*choices[start:], *choices[:start])
            if one == "auto" or not fitting or one in fitting
        )
        self._change_source(msgspec.convert(msgspec.to_builtins(source) | {"format": following}, Source))
        if following == source.format:
            self.notify("No other format fits the first rows.")
        else:
            self.notify("Format detected." if following == "auto" else f"Read in the format {following}.")

    def action_columns(self) -> None:
        """Map the columns to prompt, answer, and so on."""
        source = self.source()
        if source is None:
            return
        if self.report is not None and self.report.files:
            file = self.report.files[0]
            screen = ColumnMappingScreen(file.format, file.all_columns, {**file.columns, **source.columns})
        elif self.fields:
            format_ = self.mapping_format if source.format == "auto" else source.format
            screen = ColumnMappingScreen(format_, tuple(self.fields), source.columns)
        else:
            self.notify("Columns cannot be mapped until the file can be read.")
            return

        def on_result(columns: dict[str, str] | None) -> None:
            if columns is not None:
                self._change_source(msgspec.structs.replace(source, columns=columns))

        self.app.push_screen(screen, on_result)

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
                self._change_source(msgspec.structs.replace(source, weight=float(text)))

        title = f"Weight of {Path(source.path).name}"
        help_ = source_fields()["weight"].help
        self.app.push_screen(TextPromptScreen(title, help_, f"{source.weight:g}", validate), on_result)

    def action_validation(self) -> None:
        """Ask for a share of the rows, or a file, to validate on."""
        data = self.qlora_app.workbench.recipe.data

        def validate(text: str) -> str:
            if _share(text) is not None or Path(text).expanduser().exists():
                return ""
            return "Enter a share below 1, or the path of an existing file."

        def on_result(text: str | None) -> None:
            if text is None:
                return
            share = _share(text)
            if share is None:
                self.qlora_app.edit("data.validation_path", str(Path(text).expanduser().resolve()))
            else:
                self.qlora_app.edit("data.validation_path", "")
                self.qlora_app.edit("data.validation_fraction", share)

        text = "A share of the rows, such as 0.05 (0 for none), or the path of a validation file."
        now = data.validation_path or f"{data.validation_fraction:g}"
        self.app.push_screen(TextPromptScreen("Validation", text, now, validate), on_result)

    def action_remove(self) -> None:
        """Remove the selected source from the recipe; ask first where the list is hidden."""
        source = self.source()
        if source is None:
            return
        number = self.source_number
        if self.query_one("#sources").region.height:
            self._remove(number)
            return

        def on_result(yes: bool | None) -> None:
            if yes:
                self._remove(number)

        name = Path(source.path).name
        text = f"{name} is removed from the recipe. The file stays."
        self.app.push_screen(ConfirmScreen("Remove the source?", text, "Remove"), on_result)

    def _remove(self, number: int) -> None:
        sources = list(self.qlora_app.workbench.recipe.data.sources)
        removed = sources.pop(number)
        self.qlora_app.edit("data.sources", tuple(sources))
        self.notify(f"Removed {Path(removed.path).name}. Press {key_name('app.undo')} to undo.")

    def action_fix(self) -> None:
        """Change the setting that fixes the first problem which has such a fix."""
        if self.can_use_chosen:
            self.qlora_app.edit("data.preferences", "chosen")
            self.notify(f"Trains on the chosen and good answers only. Press {key_name('app.undo')} to undo.")
        elif self.split_rows():
            self.qlora_app.edit("data.overflow", "split")
            self.notify(f"Long texts are split into rows. Press {key_name('app.undo')} to undo.")
        elif tokens := self.untrained_tokens():
            now = self.qlora_app.workbench.recipe.lora.trainable_tokens
            self.qlora_app.edit("lora.trainable_tokens", tuple(dict.fromkeys((*now, *tokens))))
            self.notify(
                f"Embedding and head will be trained for {', '.join(tokens)}. "
                f"Press {key_name('app.undo')} to undo."
            )

    def action_view(self) -> None:
        """Show the sample, the statistics, or both."""
        body = self.query_one("#data-body")
        now = next((view for view in _VIEWS if body.has_class(f"-{view}")), "both")
        body.set_class(False, f"-{now}")
        body.set_class(True, f"-{_VIEWS[(_VIEWS.index(now) + 1) % len(_VIEWS)]}")
        self.call_after_refresh(self.show_report)

    @property
    def can_fix(self) -> bool:
        """Whether one setting fixes any of the problems."""
        return self.can_use_chosen or bool(self.split_rows() or self.untrained_tokens())

    def split_rows(self) -> int:
        """Number of rows that plain texts would be split into which are now cut or dropped."""
        return sum(problem.split_rows for problem in self.problems)

    def untrained_tokens(self) -> tuple[str, ...]:
        """Tokens that the model never learned and the recipe does not train."""
        return tuple(token for problem in self.problems for token in problem.tokens)

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
            self._change_source(Source(path=str(path)))
            if gone.path != str(path):
                self.notify(f"Replaced {Path(gone.path).name}. Press {key_name('app.undo')} to undo.")
            return
        self.source_number = len(sources)
        self.qlora_app.edit("data.sources", (*sources, Source(path=str(path))))

    def _change_source(self, source: Source) -> None:
        sources = list(self.qlora_app.workbench.recipe.data.sources)
        sources[self.source_number] = source
        self.qlora_app.edit("data.sources", tuple(sources))


def _fitting_formats(source: Source, preferences: str) -> tuple[str, ...]:
    """Formats in which the first file of a source can be read; empty if none is detected, or is not known."""
    choices = source_fields()["format"].choices
    try:
        path = files_of(Path(source.path).expanduser())[0][0]
        # The readers of columnar files are too large for this process.
        formats = () if kind_of(path) in COLUMNAR else readable_formats(path, source, choices, preferences)
    except (UserError, OSError, IndexError):
        return ()
    return formats if "auto" in formats else ()


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share < 1 else None
