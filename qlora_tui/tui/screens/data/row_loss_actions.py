"""Keys of the Data screen for what a run learned of the rows: list them, and train without some."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event

import msgspec
from textual import work

from qlora_tui.data.excluded_rows import RowPlace, file_names, parse_excluded_rows, without_rows
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Source
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.row_losses import RowLosses, measure_row_losses, read_row_losses, token_changes
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.data.row_loss_list import RowChoice, RowLossScreen
from qlora_tui.tui.screens.data.source_actions import SourceActions


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


class RowLossActions(SourceActions):
    """A screen with a source, whose rows a run may have trained on."""

    measured: tuple[RunDir, int, RowLosses] | None = None
    """Run, number of the source in it, and its rows, once the list was opened: their tokens are shaded."""
    _measuring = False

    def action_row_losses(self) -> None:
        """List the rows of the source by what the newest run on it learned of them."""
        source = self.source()
        if source is None:
            return
        if self._measuring:
            self.notify("The rows are being measured. The list opens when they are.")
            return
        self._list_rows(source)

    @work
    async def _list_rows(self, source: Source) -> None:
        run_and_number = await asyncio.to_thread(newest_run_on, source)
        if run_and_number is None:
            self.notify("No run with an adapter trained on this file. Train on it first.", severity="warning")
            return
        run, number = run_and_number
        losses = await asyncio.to_thread(read_row_losses, run)
        if losses is None or self._lacks_files(losses, number):
            self._measuring = True
            self.notify(
                f"Measuring the rows of {run.name}, about as long as training on them once. "
                "The list opens when it is done."
            )
            stop = Event()
            try:
                losses = await asyncio.to_thread(measure_row_losses, run, should_stop=stop.is_set)
            except UserError as problem:
                self.notify(f"{problem.what} {problem.fix}", title=problem.title, severity="error")
                return
            finally:
                self._measuring = False
                # Leaving the app cancels this worker, but not its thread, for whose end the app would wait.
                stop.set()
        self._show_losses(losses, run, number, source)

    def token_changes(self) -> tuple[tuple[float, float], ...]:
        """Loss before and after of each token in the loss of the row shown; empty where not measured."""
        if self.measured is None:
            return ()
        run, number, losses = self.measured
        row = losses.row_of(number, RowPlace(self._names().get(self.path, ""), self.row))
        return () if row is None else token_changes(run, row)

    def _lacks_files(self, losses: RowLosses, number: int) -> bool:
        """Whether an early version measured the rows of a folder: it did not note their files."""
        rows = [row for row in losses.rows if row.source == number]
        return any(self._names().values()) and bool(rows) and not any(row.file for row in rows)

    def _names(self) -> dict[str, str]:
        """Name in the source of each of its files, by path; empty until a report was read."""
        source = self.source()
        if self.report is None or source is None:
            return {}
        paths = [Path(file.path) for file in self.report.files]
        return dict(zip(map(str, paths), file_names(source.path, paths), strict=True))

    def _go_to_place(self, place: RowPlace) -> None:
        path = next((path for path, name in self._names().items() if name == place.file), "")
        self.go_to_row(path, place.row)

    def _show_losses(self, losses: RowLosses, run: RunDir, number: int, source: Source) -> None:
        self.measured = run, number, losses

        def on_result(choice: RowChoice | None) -> None:
            if choice is None:
                return
            if choice.excluded:
                self._queue_without(run, number, choice.excluded)
            else:
                self._go_to_place(choice.place)

        excluded = parse_excluded_rows(source.excluded_rows)
        self.app.push_screen(RowLossScreen(losses, number, excluded), on_result)

    @work
    async def _queue_without(self, run: RunDir, number: int, rows: tuple[RowPlace, ...]) -> None:
        """Leave rows out of the recipe, and queue the run again without them."""
        recipe = run.recipe()
        sources = list(recipe.data.sources)
        sources[number] = without_rows(sources[number], rows)
        data = msgspec.structs.replace(recipe.data, sources=tuple(sources))
        try:
            queued = await asyncio.to_thread(run_actions.submit, msgspec.structs.replace(recipe, data=data))
        except UserError as problem:
            self.notify(f"{problem.what} {problem.fix}", title=problem.title, severity="error")
            return
        source = self.source()
        if source is not None and Path(source.path).absolute() == Path(sources[number].path).absolute():
            self.change_source(without_rows(source, rows))
        self.notify(
            f"Queued {queued.name} without {pluralize(len(rows), 'row')}; the recipe leaves them out too. "
            f"Press {key_name('app.undo')} to undo that."
        )
