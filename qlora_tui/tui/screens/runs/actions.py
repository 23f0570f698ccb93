"""What the keys of the Runs screen do: with a run, its recipe, or the list."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections.abc import Callable

from textual.widgets import Input

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.presets import OverwriteError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs import run_queue, trash
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.initial_adapter import initial_adapter
from qlora_tui.runs.run_summary import Listing, RunSummary
from qlora_tui.tui.folders import open_folder
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.answer_measuring import EvaluationActions
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen, TextPromptScreen
from qlora_tui.tui.screens.presets.preset_files import save_as
from qlora_tui.tui.screens.runs.compare import MAX_COMPARED, CompareScreen
from qlora_tui.tui.screens.runs.export_dialog import show_export_dialog
from qlora_tui.tui.screens.runs.run_order import ORDERS
from qlora_tui.tui.screens.runs.run_table import RunTable
from qlora_tui.tui.screens.train.screen import prepare_run, show_run


class RunActions(EvaluationActions):
    """A screen with a run under the cursor."""

    ANSWERS_COMMAND = "runs.evaluate"

    def __init__(self) -> None:
        super().__init__()
        self.listing: Listing | None = None
        self.order = ORDERS[0]
        self.marked: tuple[str, ...] = ()
        """The runs selected for a comparison."""

    @property
    @abstractmethod
    def current(self) -> RunSummary | None:
        """The run under the cursor."""

    @abstractmethod
    def refresh_runs(self) -> None:
        """Reload the run list."""

    @abstractmethod
    def show_listing(self) -> None:
        """Show the run list as it was read last."""

    async def action_open(self) -> None:
        """Watch the run under the cursor."""
        if self.current is not None:
            await show_run(self.qlora_app, self.current.run)

    def action_mark(self) -> None:
        """Toggle the run's mark for a comparison."""
        if self.current is None:
            return
        name = self.current.id
        if name in self.marked:
            self.marked = tuple(marked for marked in self.marked if marked != name)
        elif len(self.marked) == MAX_COMPARED:
            self.notify(f"At most {MAX_COMPARED} runs can be compared.", severity="warning")
        else:
            self.marked = (*self.marked, name)
        self.show_listing()
        self.query_one(RunTable).action_move(1)

    def action_compare(self) -> None:
        """Show the marked runs side by side."""
        if len(self.marked) < 2:
            another = "Mark another run" if self.marked else "Mark two to four runs"
            self.notify(f"{another} with {key_name('runs.mark')} to compare them.")
            return
        known = {summary.id: summary.run for summary in self.listing.summaries} if self.listing else {}
        self.app.push_screen(CompareScreen([known[name] for name in self.marked if name in known]))

    def action_sort(self) -> None:
        """Sort by the next of the orders."""
        self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        self.show_listing()

    def action_filter(self) -> None:
        """Focus the filter."""
        self.add_class("-filtering")
        self.query_one("#runs-filter", Input).focus()

    async def action_chat(self) -> None:
        """Talk to the adapter."""
        from qlora_tui.tui.screens.chat.screen import show_chat

        if self.current is not None:
            await show_chat(self.qlora_app, self.current.run)

    def action_evaluate(self) -> None:
        """Compare answers of the adapter and its base to validation prompts."""
        if self.current is not None:
            self.evaluate(self.current.run)

    def action_export(self) -> None:
        """Choose a form to export the adapter in."""
        if self.current is not None:
            show_export_dialog(self.qlora_app, self.current.run)

    def action_move(self, places: int) -> None:
        """Move the run in the queue."""
        if self.current is not None:
            run_queue.move(self.current.run, places)
            self.refresh_runs()

    def action_withdraw(self) -> None:
        """Remove the run from the queue; it can be queued again."""
        if self.current is not None and self._act_on(self.current.run, run_actions.stop):
            self.notify(f"Removed from the queue. Press {key_name('runs.resume')} to queue it again.")

    def action_resume(self) -> None:
        """Queue the run again, to continue from its last checkpoint."""
        if self.current is not None and self._act_on(self.current.run, run_actions.resume):
            self.notify(f"Queued. Press {key_name('runs.withdraw')} to remove it from the queue.")

    async def action_rerun(self) -> None:
        """Edit the run's recipe."""
        if (recipe := self._recipe()) is not None:
            await self._prepare(recipe)

    async def action_train_further(self) -> None:
        """Edit the run's recipe, to start from its adapter."""
        recipe = self._recipe()
        if recipe is None or self.current is None:
            return
        run = self.current.run
        if self.qlora_app.try_or_show_error(lambda: initial_adapter(run.id)):
            await self._prepare(replace_setting(recipe, "lora.init_from", run.id))

    async def _prepare(self, recipe: Recipe) -> None:
        """Load a recipe, and show the checks before its launch."""
        if self.qlora_app.load_recipe(recipe):
            self.notify(f"Loaded the run's recipe. Press {key_name('app.undo')} to undo.")
        await prepare_run(self.qlora_app)

    def action_save_preset(self) -> None:
        """Ask for a name, and keep the settings under it."""
        recipe = self._recipe()
        if recipe is None:
            return

        def on_result(name: str | None) -> None:
            if name:
                self._save_preset(name, recipe)

        self.app.push_screen(
            TextPromptScreen("Save as a preset", "Name of the preset. Model and data are left out.", ""),
            on_result,
        )

    def action_rename(self) -> None:
        """Ask for another name."""
        summary = self.current
        if summary is None:
            return

        def on_result(name: str | None) -> None:
            if name is not None:
                self._act_on(summary.run, lambda run: run_actions.rename(run, name))

        text = "The new name. The folder keeps its name."
        self.app.push_screen(
            TextPromptScreen("Rename the run", text, summary.name, run_actions.validate_name), on_result
        )

    def action_delete(self) -> None:
        """Move the run to the trash; ask first only where something else uses it."""
        summary = self.current
        if summary is None:
            return
        uses = run_actions.uses_of(summary.run)
        if not uses:
            self._delete(summary)
            return

        def on_result(yes: bool | None) -> None:
            if yes:
                self._delete(summary)

        text = f"{summary.name} is in use: {'; '.join(uses)}."
        self.app.push_screen(ConfirmScreen("Delete the run?", text, "Delete"), on_result)

    def _delete(self, summary: RunSummary) -> None:
        if self._act_on(summary.run, trash.put):
            self.qlora_app.deleted_runs.append(summary.id)
            self.show_listing()
            self.notify(
                f"{summary.name} is in the trash for {trash.KEPT_DAYS} days, which holds "
                f"{format_bytes(trash.total_bytes())}. Press {key_name('runs.restore')} to restore it."
            )

    def action_restore(self) -> None:
        """Restore the run that was deleted last."""
        deleted = self.qlora_app.deleted_runs
        try:
            if deleted:
                self.notify(f"Restored {trash.restore(deleted[-1]).name}.")
                deleted.pop()
        except UserError as problem:
            self.qlora_app.show_error(problem)
        self.refresh_runs()

    def action_copy(self, verb: str) -> None:
        """Copy the command that shows the run in a terminal, or that trains it again."""
        if self.current is not None:
            run = self.current.run
            words = run.id if verb == "attach" else str(run.recipe_path)
            self.app.copy_to_clipboard(f"qlora-tui {verb} {shlex.quote(words)}")

    def action_folder(self) -> None:
        """Open the folder of the run, or copy the command that goes there."""
        if self.current is not None:
            open_folder(self.qlora_app, self.current.run.path)

    def _recipe(self) -> Recipe | None:
        if self.current is None:
            return None
        try:
            return self.current.run.recipe()
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return None

    def _save_preset(self, name: str, recipe: Recipe, *, overwrite: bool = False) -> None:
        try:
            save_as(name, recipe, overwrite=overwrite)
        except OverwriteError as problem:

            def on_result(yes: bool | None) -> None:
                if yes:
                    self._save_preset(name, recipe, overwrite=True)

            self.app.push_screen(ConfirmScreen("Overwrite the preset?", problem.what, "Overwrite"), on_result)
        except UserError as problem:
            self.qlora_app.show_error(problem)
        else:
            self.notify(f"Saved as {name}. Press {key_name('app.presets')} to see your presets.")

    def _act_on(self, run: RunDir, act: Callable[[RunDir], None]) -> bool:
        """Call ``act``, show an error if it fails, and reload the list either way."""
        succeeded = self.qlora_app.try_or_show_error(lambda: act(run))
        self.refresh_runs()
        return succeeded
