"""A strip below the top bar with the recipe in one line. If the model cannot be trained, the strip can also
say why.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from rich.cells import cell_len
from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from qlora_tui.errors import UserError
from qlora_tui.formatting import uncapitalize
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.key_names import bare_key, command_key, key_hint
from qlora_tui.tui.render.labels import (
    CANNOT_TRAIN,
    assumed_words,
    join_parts,
    next_step,
    recipe_line,
    recipe_parts,
    refusal_words,
)
from qlora_tui.tui.workbench import Workbench

_MODEL, _DATA = 1, 2
"""Indexes of the names of model and data in the result of :func:`recipe_parts`."""
_NEXT_RUN = "next run: "
_UNDO = ("app.undo", "undo")
_HINTS = ((("app.presets", "presets"), _UNDO), (_UNDO,))
"""Variants of the keys at the end of the first line, longest first. Each has (command id, label) pairs."""


class RecipeStrip(Widget):
    """The recipe on one line, on every screen that edits it."""

    DEFAULT_CSS = """
    RecipeStrip {
        dock: top;
        height: 1;
        margin-top: 1;
        padding: 0 1;
        background: $surface;
    }
    """

    def __init__(self, *, tells: Literal["nothing", "problem", "step"]) -> None:
        """Create the strip.

        Args:
            tells: What the strip says, in addition to the recipe, if the model cannot be trained:
                ``nothing``, the ``problem``, or the problem and the ``step`` that solves it.
        """
        super().__init__()
        # Show the keys at the end of the line dim instead of in the color of links.
        self.auto_links = False
        self._tells = tells
        self._bench: Workbench | None = None
        self._recipe_line = ""
        self._problem: UserError | None = None
        self._is_of_model = False
        """Whether the problem would be solved by selecting another model or by downloading this model's
        missing files.
        """
        self._is_running = False
        self._is_changed_elsewhere = False
        self._assumed: tuple[str, ...] = ()

    def show_running(self, *, is_running: bool) -> None:
        """Show whether a run is active. If a run is active and the window is wide, the line says that the
        recipe is for the next run.
        """
        if is_running != self._is_running:
            self._is_running = is_running
            self.refresh()

    def show_recipe(
        self,
        workbench: Workbench,
        budget: MemoryBudget,
        machine: MemoryBudget,
        *,
        is_changed_elsewhere: bool = False,
    ) -> None:
        """Show the recipe, why it cannot be trained or estimated, and whether another window has changed the
        recipe.

        Args:
            workbench: The recipe.
            budget: The memory that the recipe is compared with. If its size is assumed, the line says so.
            machine: The device on which a run would train.
            is_changed_elsewhere: Whether another window has changed the recipe.
        """
        if is_changed_elsewhere != self._is_changed_elsewhere:
            self._is_changed_elsewhere = is_changed_elsewhere
            self.refresh()
        if (assumed := assumed_words(budget, machine)) != self._assumed:
            self._assumed = assumed
            self.refresh()
        compared = workbench.comparison(budget.device)
        refusal = workbench.model_refusal()
        problem = refusal or (compared if isinstance(compared, UserError) else None)
        shown = (recipe_line(workbench), problem if workbench.recipe.model.id else None, refusal is not None)
        if shown != (self._recipe_line, self._problem, self._is_of_model):
            self._bench = workbench
            self._recipe_line, self._problem, self._is_of_model = shown
            self.refresh()

    def render(self) -> RenderResult:
        width = self.content_size.width
        prefix = _NEXT_RUN if self._is_running and self.size.width >= WIDE_CELLS else ""
        width -= len(prefix)
        variants = self._problem_variants()
        assumed = self._assumed_note(width - variants[0].cell_length)
        width -= assumed.cell_length
        problem = next(filter(partial(self._has_room_for, width), variants), variants[-1])
        line, hint = self._line_and_hint(width - problem.cell_length)
        gap = " " * (width - problem.cell_length - cell_len(line) - hint.cell_length)
        return Content.assemble((prefix, "dim"), line, gap, hint, assumed, problem)

    def _assumed_note(self, width: int) -> Content:
        """Return the longest note about the assumed GPU that leaves room for the full line of the recipe and
        for the key for undo. If no note leaves enough room, return the shortest note. If no size is assumed,
        return an empty note.
        """
        notes = [Content.styled(f"  {words}", "$warning") for words in self._assumed]
        if not notes or self._bench is None:
            return Content("")
        room = width - cell_len(join_parts(recipe_parts(self._bench))) - _hint(*_UNDO).cell_length - 2
        return next((note for note in notes if note.cell_length <= room), notes[-1])

    def _problem_variants(self) -> list[Content]:
        """Return what the strip says about the problem, longest first."""
        if self._problem is None or self._tells == "nothing":
            return [Content("")]
        shortest = min(uncapitalize(self._problem.title), CANNOT_TRAIN, key=cell_len)
        variants = [
            Content.styled(f"  ✗ {words}", "$error") for words in (refusal_words(self._problem), shortest)
        ]
        if self._tells == "step" and self._is_of_model:
            variants.insert(0, Content(" ").join([variants[0], next_step("go.models", "fix")]))
        return variants

    def _has_room_for(self, width: int, problem: Content) -> bool:
        """Return whether the recipe fits next to ``problem`` and the key for undo, with the whole names of
        model and data.
        """
        if self._bench is None:
            return True
        full = recipe_parts(self._bench)
        room = width - problem.cell_length - _hint(*_UNDO).cell_length - 2
        parts = recipe_parts(self._bench, room)
        names = slice(_MODEL, _DATA + 1)
        return parts[names] == full[names] and cell_len(join_parts(parts)) <= room

    def _line_and_hint(self, width: int) -> tuple[str, Content]:
        """Return the line of the recipe, and the longest variant of the keys (``_HINTS``) that fits next to
        it. The keys are empty if no variant fits.

        To make room for the shortest variant, everything but the name of the model may be shortened, and
        everything but both names may be left out.
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
            line = join_parts(parts)
            if commands == _HINTS[-1]:
                is_allowed = parts[_MODEL] == widest[_MODEL] and bool(parts[_DATA]) == bool(widest[_DATA])
            else:
                is_allowed = parts == widest
            if is_allowed and cell_len(line) <= room:
                return line, hint
        return recipe_line(self._bench, width), Content("")


def reload_hint() -> Content:
    """Return the note that another window has changed the recipe: ``changed in another window, F7 reload``. A
    click on the key presses it.
    """
    words = Content.styled("changed in another window, ", "$warning")
    return words + _hint("app.reload", "reload")


def _hint(command: str, label: str) -> Content:
    """Return a command's key and label, such as ``u undo``. A click on them presses the key."""
    return key_hint(bare_key(command), label, command_key(command))
