"""Shown by a screen in place of its content while the recipe has no usable model."""

from __future__ import annotations

from textual.widgets import Static

from qlora_tui.errors import UserError


class ModelProblem(Static):
    """What is wrong with the model of the recipe, and what to do; hidden while nothing is."""

    DEFAULT_CSS = """
    ModelProblem {
        height: auto;
        padding: 1 2;
        color: $text-muted;
    }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)

    def show(self, problem: UserError | None) -> None:
        """Show ``problem``, or hide the widget where there is none."""
        self.display = problem is not None
        if problem is not None:
            self.update("\n".join(filter(None, (problem.what, problem.why, f"▸ {problem.fix}"))))
