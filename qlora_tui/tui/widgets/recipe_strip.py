"""The recipe in one line below the top bar; a second line shows its memory, except on screens that have their
own panel for memory.
"""

from __future__ import annotations

from rich.cells import cell_len
from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from qlora_tui.errors import UserError
from qlora_tui.formatting import uncapitalize
from qlora_tui.memory import Estimate, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Precision, precision_of
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.key_names import bare_key, command_key, key_hint
from qlora_tui.tui.render.labels import (
    CANNOT_TRAIN,
    PRECISION_NAMES,
    SEPARATOR,
    FitLine,
    cut_cells,
    recipe_line,
    recipe_parts,
)
from qlora_tui.tui.workbench import Workbench

_GAP = 2
_NEXT_RUN = "next run: "
_UNDO = ("app.undo", "undo")
_HINTS = ((("app.presets", "presets"), _UNDO), (_UNDO,))
"""Variants of the keys at the end of the first line, longest first. Each has (command id, label) pairs."""


class RecipeStrip(Widget):
    """The recipe in a line or two, on every screen that edits it."""

    DEFAULT_CSS = """
    RecipeStrip {
        dock: top;
        height: 2;
        margin-top: 1;
        padding: 0 1;
        background: $surface;
        &.-brief {
            height: 1;
        }
    }
    """

    def __init__(self, *, with_memory: bool) -> None:
        """Create the strip. ``with_memory`` adds a second line with the memory."""
        super().__init__(classes="" if with_memory else "-brief")
        # Show the keys at the end of the line dim instead of in the color of links.
        self.auto_links = False
        self._with_memory = with_memory
        self._bench: Workbench | None = None
        self._recipe_line = ""
        self._shown: tuple[Precision, Precision] = ("nf4", "fp16")
        self._comparison: dict[Precision, Estimate] | UserError | None = None
        self._budget: MemoryBudget | None = None
        self._can_train = True
        self._is_running = False
        self._is_changed_elsewhere = False

    def show_running(self, *, is_running: bool) -> None:
        """Show whether a run is active. If a run is active and the window is wide, the line says that the
        recipe is for the next run.
        """
        if is_running != self._is_running:
            self._is_running = is_running
            self.refresh()

    def show_recipe(
        self, workbench: Workbench, budget: MemoryBudget, *, is_changed_elsewhere: bool = False
    ) -> None:
        """Show the recipe, the available memory, and whether another window has changed the recipe."""
        if is_changed_elsewhere != self._is_changed_elsewhere:
            self._is_changed_elsewhere = is_changed_elsewhere
            self.refresh()
        can_train = workbench.model_refusal() is None
        shown = (recipe_line(workbench), workbench.comparison(budget.device), budget, can_train)
        if shown != (self._recipe_line, self._comparison, self._budget, self._can_train):
            self._bench = workbench
            self._recipe_line, self._comparison, self._budget, self._can_train = shown
            own = precision_of(workbench.recipe)
            self._shown = ("nf4" if own == "fp16" else own, "fp16")
            self.refresh()

    def render(self) -> RenderResult:
        width = self.content_size.width
        prefix = _NEXT_RUN if self._is_running and self.size.width >= WIDE_CELLS else ""
        problem = Content("") if self._with_memory else self._problem()
        room = width - len(prefix) - problem.cell_length
        line, hint = self._line_and_hint(room)
        gap = " " * (room - cell_len(line) - hint.cell_length)
        first = Content.assemble((prefix, "dim"), line, gap, hint, problem)
        return Content("\n").join([first, self._cost_line(width)]) if self._with_memory else first

    def _problem(self) -> Content:
        """Return why the recipe's memory is unknown or its model cannot be trained; empty if neither is the
        case, or if there is no model.
        """
        if self._bench is None or not self._bench.recipe.model.id:
            return Content("")
        if isinstance(self._comparison, UserError):
            return Content.styled(f"  ✗ {uncapitalize(self._comparison.title)}", "$error")
        return Content("") if self._can_train else Content.styled(f"  {CANNOT_TRAIN}", "$error")

    def _line_and_hint(self, width: int) -> tuple[str, Content]:
        """Return the line of the recipe, and the longest variant of the keys (``_HINTS``) that fits next to
        it. The keys are empty if no variant fits.

        To make room for the shortest variant, the name of the data may be shortened and the batch
        abbreviated.
        """
        if self._bench is None:
            return "", Content("")
        if self._is_changed_elsewhere:
            hint = reload_hint()
            return recipe_line(self._bench, width - hint.cell_length - 2), hint
        widest = recipe_parts(self._bench, width)
        for commands in _HINTS:
            hint = Content("  ").join(_hint(*command) for command in commands)
            room = width - hint.cell_length - 2
            parts = recipe_parts(self._bench, room)
            shortened = {place for place, part in enumerate(parts) if part != widest[place]}
            # Parts 2 and 4 are the name of the data and the batch.
            allowed = {2, 4} if commands == _HINTS[-1] else set()
            line = SEPARATOR.join(parts)
            if shortened <= allowed and cell_len(line) <= room:
                return line, hint
        return recipe_line(self._bench, width), Content("")

    def _cost_line(self, width: int) -> Content:
        if self._comparison is None or self._budget is None:
            return Content("")
        if isinstance(self._comparison, UserError):
            message = f"{self._comparison.what} {self._comparison.fix}".replace("\n", " ")
            return Content.styled(cut_cells(message, width), "dim")
        head = () if self._can_train else (Content.styled(CANNOT_TRAIN, "$error"),)
        costs = [
            FitLine(
                PRECISION_NAMES[key],
                check_fit(self._comparison[key], self._budget.bytes),
                is_assumed=self._budget.is_assumed,
                can_train=self._can_train,
            )
            for key in self._shown
        ]
        room = width - sum(part.cell_length + _GAP for part in head)
        if sum(cost.least_width for cost in costs) + _GAP > room:
            costs = costs[:1]
        each = (room + _GAP) // len(costs) - _GAP
        if len(costs) > 1:
            each = min(each, room - _GAP - costs[1].least_width)
        lines = [cost.draw(max(each, cost.least_width)) for cost in costs]
        padded = [line.pad_right(max(0, each - line.cell_length)) for line in lines]
        return Content(" " * _GAP).join([*head, *padded])


def reload_hint() -> Content:
    """Return the note that another window has changed the recipe: ``changed in another window, F7 reload``. A
    click on the key presses it.
    """
    words = Content.styled("changed in another window, ", "$warning")
    return words + _hint("app.reload", "reload")


def _hint(command: str, label: str) -> Content:
    """Return a command's key and label, such as ``u undo``. A click on them presses the key."""
    return key_hint(bare_key(command), label, command_key(command))
