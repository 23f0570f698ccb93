"""Keys of the Data screen for how data is read and trained on."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Literal

import msgspec
from textual import work

from qlora_tui.data.format_choices import AUTO
from qlora_tui.data.problems import is_bad_row
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Preferences, Source
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.data.column_mapping import ColumnMappingScreen
from qlora_tui.tui.screens.data.format_picker import FormatPickerScreen
from qlora_tui.tui.screens.data.preference_picker import PreferencePickerScreen
from qlora_tui.tui.screens.data.previews import DataPreviews
from qlora_tui.tui.screens.data.row_loss_actions import RowLossActions
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen

_VIEWS = ("both", "figures", "sample")


class DataActions(RowLossActions):
    """A screen with a selected source, and keys for how it is read and trained on."""

    fields: dict[str, str] = {}  # noqa: RUF012
    """Columns of a file in no known format, for the mapping by hand."""
    refused_preferences: Literal["", "pairs", "ratings"] = ""
    """The kind of preferences for which the source is refused, and which the recipe can train on."""
    mapping_format = "prompt-completion"
    """The format to map columns for if ``unreadable_source`` has the format ``auto``."""

    def __init__(self) -> None:
        super().__init__()
        self.previews = DataPreviews()

    @abstractmethod
    def show_report(self) -> None:
        """Show lengths and problems again."""

    @abstractmethod
    def reload(self) -> None:
        """Read the source again."""

    def action_reload(self) -> None:
        """Read the source again, whether it changed or not."""
        if self.source() is not None:
            self.reload()
            self.notify("Reading the data again.")

    @work(exclusive=True, group="formats")
    async def action_format(self) -> None:
        """Choose the format in which the rows are read, by how many each of them reads."""
        source = self.source()
        if source is None:
            return
        preferences = self.qlora_app.workbench.recipe.data.preferences
        try:
            choices = await self.previews.formats(source, preferences)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return

        def on_result(format_: str | None) -> None:
            if format_ is None or format_ == source.format:
                return
            self.change_source(msgspec.convert(msgspec.to_builtins(source) | {"format": format_}, Source))
            undo = f"Press {key_name('app.undo')} to undo."
            self.notify(f"Format detected. {undo}" if format_ == AUTO else f"Read as {format_}. {undo}")

        self.app.push_screen(FormatPickerScreen(choices, source.format), on_result)

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
                self.change_source(msgspec.structs.replace(source, columns=columns))

        self.app.push_screen(screen, on_result)

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

    def action_fix(self) -> None:
        """Change the setting that fixes the first problem which has such a fix."""
        if self.refused_preferences:
            self._choose_preferences()
        elif self.bad_rows():
            self.action_bad_rows()
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

    def _choose_preferences(self) -> None:
        def on_result(choice: Preferences | None) -> None:
            if choice is not None:
                self.qlora_app.edit("data.preferences", choice)
                trains = (
                    "Trains on the better answers only." if choice == "chosen" else f"Trains with {choice}."
                )
                self.notify(f"{trains} Press {key_name('app.undo')} to undo.")

        rated = self.refused_preferences == "ratings"
        self.app.push_screen(PreferencePickerScreen(rated=rated), on_result)

    def action_bad_rows(self) -> None:
        """Leave rows out that cannot be used, or refuse to train while there are any."""
        bad_rows = self.bad_rows()
        skips = self.qlora_app.workbench.recipe.data.bad_rows == "skip"
        self.qlora_app.edit("data.bad_rows", "refuse" if skips else "skip")
        undo = f"Press {key_name('app.undo')} to undo."
        if skips:
            self.notify(f"No run starts while the data has bad rows. {undo}")
        elif bad_rows:
            self.notify(f"Runs leave {pluralize(bad_rows, 'bad row')} out. {undo}")
        else:
            self.notify(f"Runs leave bad rows out, if there are any. {undo}")

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
        return bool(
            self.refused_preferences or self.bad_rows() or self.split_rows() or self.untrained_tokens()
        )

    def bad_rows(self) -> int:
        """Number of rows for which no run can start, and which could be left out."""
        return sum(problem.count for problem in self.problems if is_bad_row(problem))

    def split_rows(self) -> int:
        """Number of rows that plain texts would be split into which are now cut or dropped."""
        return sum(problem.split_rows for problem in self.problems)

    def untrained_tokens(self) -> tuple[str, ...]:
        """Tokens that the model never learned and the recipe does not train."""
        return tuple(token for problem in self.problems for token in problem.tokens)


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share < 1 else None
