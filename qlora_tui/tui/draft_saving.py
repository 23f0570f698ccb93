"""Opens the workbench from the draft, and saves it there; asks where another app has changed the draft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tui.errors import UserError
from qlora_tui.recipe.diff import diff_recipes
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.workbench import FIRST_PRESET, Workbench

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.screens.modals.dialogs import DraftChoice


def open_workbench(draft: Draft) -> Workbench:
    """The workbench as it was left; a fresh one where there is no draft, or it cannot be read.

    A preset that was deleted or damaged since takes nothing of the recipe with it.
    """
    saved = draft.load()
    preset_error = None
    for name in (saved.preset or FIRST_PRESET, FIRST_PRESET):
        # The user may have a preset of either name, and have broken it.
        try:
            workbench = Workbench(saved.recipe, name)
            break
        except UserError as problem:
            preset_error = preset_error or problem
    else:
        workbench = Workbench(saved.recipe, preset="")
    workbench.preset_error, workbench.draft_error = preset_error, saved.error
    return workbench


def save_or_ask(app: QloraApp) -> None:
    """Save the workbench as the draft; where another app changed that, ask whose recipe to keep.

    Raises OSError.
    """
    from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen

    if app.draft.save(app.workbench) or isinstance(app.screen, DraftChangedScreen):
        return
    other_draft = Draft()
    other = open_workbench(other_draft)
    if other.draft_error is not None:
        app.notify(str(other.draft_error), severity="warning", timeout=10)
        app.draft.save(app.workbench)
        return

    def on_result(choice: DraftChoice | None) -> None:
        if choice == "mine":
            app.draft.save(app.workbench, replace=True)
        elif choice == "theirs":
            _adopt(app, other_draft, other)

    changes = [str(change) for change in diff_recipes(app.workbench.recipe, other.recipe)]
    app.push_screen(DraftChangedScreen(changes, app.draft.aside), on_result)


def tell_of_change(app: QloraApp) -> None:
    """Say once for each change that another app has changed the draft, which this app does not show."""
    from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen

    # While the app closes it has no screens.
    is_asking = any(isinstance(screen, DraftChangedScreen) for screen in app.screen_stack)
    if app.screen_stack and not is_asking and app.draft.is_changed_elsewhere():
        app.notify(
            "Another app changed the recipe. This one shows its own, and your next edit asks whose stays.",
            severity="warning",
            timeout=10,
        )


def _adopt(app: QloraApp, other_draft: Draft, other: Workbench) -> None:
    app.draft = other_draft
    app.workbench.adopt(other)
    app.recipe_edited()
    app.notify(f"Loaded the other app's recipe. Press {key_name('app.undo')} to restore yours.")
