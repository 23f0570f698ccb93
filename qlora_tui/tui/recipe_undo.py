"""Undo and redo of the recipe, with a notification where screens do not show what changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_tui.formatting import pluralize
from qlora_tui.tui.key_names import key_name

if TYPE_CHECKING:
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.tui.app import QloraApp


# Home is painted without the recipe package, so the comparison is imported where it is used.


def undo_recipe(app: QloraApp) -> None:
    """Undo the last change of the recipe."""
    nothing = "Nothing to undo: the recipe was not changed."
    _move(app, app.workbench.undo, "Undone", nothing, f"Press {key_name('app.redo')} to redo.")


def redo_recipe(app: QloraApp) -> None:
    """Redo the change that was undone."""
    nothing = "Nothing to redo: no change was undone."
    _move(app, app.workbench.redo, "Redone", nothing, f"Press {key_name('app.undo')} to undo.")


def notify_opened(app: QloraApp, before: Recipe) -> None:
    """Show which preset was opened, and how much it changed."""
    changes = _changes(before, app.workbench.recipe)
    app.notify(f"Opened {app.workbench.preset}: {changes}. Press {key_name('app.undo')} to undo.")


def _move(app: QloraApp, move: Callable[[], bool], done: str, nothing: str, reverse: str) -> None:
    workbench = app.workbench
    before, preset = workbench.recipe, workbench.preset
    if not move():
        app.notify(nothing)
        return
    app.recipe_edited()
    # Screens show a change of one setting; a preset changes many, most of them on other screens.
    if workbench.preset != preset:
        now = (
            f"the preset is {workbench.preset} again"
            if workbench.preset
            else "the recipe has no preset again"
        )
        app.notify(f"{done}: {now}, {_changes(before, workbench.recipe)}. {reverse}")


def _changes(before: Recipe, after: Recipe) -> str:
    from qlora_tui.recipe.diff import DESCRIPTIVE, diff_recipes

    changes = [change for change in diff_recipes(before, after) if change.path not in DESCRIPTIVE]
    return f"{pluralize(len(changes), 'setting')} changed"
