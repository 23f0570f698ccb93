"""The key of the Train screen that looks for a learning rate."""

from __future__ import annotations

from qlora_tui.runs.lr_range import at_learning_rate
from qlora_tui.runs.lr_suggestion import format_rate
from qlora_tui.runs.machine_checks import Check
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.train.lr_finder import LrFinderScreen


class LrFinderActions(WorkScreen):
    """A screen that prepares a run."""

    def __init__(self) -> None:
        super().__init__()
        self.checks: tuple[Check, ...] = ()
        """What the last checks of the recipe found."""

    def action_find_rate(self) -> None:
        """Show how the loss depends on the learning rate, and use a rate of the curve."""
        problem = next((check.problem for check in self.checks if check.problem is not None), None)
        if problem is not None:
            self.qlora_app.show_error(problem)
            return

        def on_result(rate: float | None) -> None:
            if rate is not None:
                self.qlora_app.load_recipe(at_learning_rate(self.qlora_app.workbench.recipe, rate))
                self.notify(
                    f"Learning rate set to {format_rate(rate)}. Press {key_name('app.undo')} to undo."
                )

        self.app.push_screen(LrFinderScreen(self.qlora_app.workbench.recipe), on_result)
