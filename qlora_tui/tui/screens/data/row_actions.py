"""Keys of the Data screen that go from row to row, and from problem to problem."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.data import row_navigation
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen

if TYPE_CHECKING:
    from qlora_tui.data.dataset_report import Report, Shown
    from qlora_tui.data.problems import DataProblem


class RowActions(WorkScreen):
    """A screen with a report on a source, and one of its rows."""

    report: Report | None
    shown: Shown | None
    """The row on the screen; None until one was read."""
    row: int
    path: str
    """The file of the source that the row is from; empty is its first."""

    @abstractmethod
    def go_to_row(self, path: str, row: int) -> None:
        """Read and show another row."""

    def action_row(self, by: int) -> None:
        """Show a neighboring row."""
        place = row_navigation.neighbor((self.path, self.row), by, self.report.files if self.report else ())
        if self.shown is None or place != (self.path, self.row):
            self.go_to_row(*place)

    def action_go_to(self) -> None:
        """Ask for a row's number."""
        files = self.report.files if self.report else ()

        def on_result(text: str | None) -> None:
            if text is not None and (place := row_navigation.parse_place(text, self.path, files)) is not None:
                self.go_to_row(*place)

        def validate(text: str) -> str:
            return "" if row_navigation.parse_place(text, self.path, files) else "Enter a row number."

        help_ = "The row number, from 1."
        if len(files) > 1:
            help_ += " To go to another file, put a part of its name before the number."
        self.app.push_screen(TextPromptScreen("Go to a row", help_, "", validate), on_result)

    def action_problem(self, by: int) -> None:
        """Show the next row with a problem, from the first again after the last."""
        if not any(problem.rows for problem in self.problems):
            complete = self.report is not None and self.report.complete
            self.notify("No row has a problem." if complete else "No problems so far. Still reading.")
            return
        self.go_to_next_problem(self.problems, by)

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        """The problems in the report, except those that the recipe already fixes."""
        problems = self.report.problems if self.report else ()
        trained = set(self.qlora_app.workbench.recipe.lora.trainable_tokens)
        return tuple(p for p in problems if not p.tokens or not trained.issuperset(p.tokens))

    def go_to_next_problem(self, problems: Sequence[DataProblem], by: int) -> None:
        """Show the next row with one of these problems."""
        files = self.report.files if self.report else ()
        place = row_navigation.next_problem(problems, (self.path, self.row), by, files)
        if place is not None:
            self.go_to_row(*place)
