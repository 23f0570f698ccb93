"""Asks whose recipe stays when another app has changed the draft."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.recipe.diff import diff_recipes
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.workbench import Workbench

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_MAX_LINES = 8
DraftChoice = Literal["mine", "theirs"]


class DraftChangedScreen(ModalScreen[DraftChoice | None]):
    """Returns the choice; None if it was postponed, so that the next edit asks again."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "dismiss('mine')", "Keep mine"),
        Binding("t", "dismiss('theirs')", "Use theirs"),
        Binding("escape", "dismiss(None)", "Decide later"),
    ]

    def __init__(self, changes: list[str]) -> None:
        super().__init__()
        self._changes = changes

    def compose(self) -> ComposeResult:
        shown = self._changes[:_MAX_LINES]
        if len(self._changes) > _MAX_LINES:
            shown.append(f"and {len(self._changes) - _MAX_LINES} more")
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Another app changed the recipe"
            yield Static("Your last edit is not saved. Changes from yours to theirs:", markup=False)
            yield Static("\n".join(shown) or "Only the preset it started from differs.", markup=False)
            keys = "[m] Keep mine      [t] Use theirs      Esc Decide later"
            yield Static(keys, markup=False, classes="fix")


def save_or_ask(app: QloraApp) -> None:
    """Save the workbench as the draft; where another app changed that, ask whose stays."""
    if app.draft.save(app.workbench) or isinstance(app.screen, DraftChangedScreen):
        return
    other_draft = Draft()
    other = other_draft.load()
    if other.lost_draft is not None:
        app.notify(str(other.lost_draft), severity="warning", timeout=10)
        app.draft.save(app.workbench)
        return

    def on_result(choice: DraftChoice | None) -> None:
        if choice == "mine":
            app.draft.save(app.workbench, replace=True)
        elif choice == "theirs":
            _adopt(app, other_draft, other)

    changes = [str(change) for change in diff_recipes(app.workbench.recipe, other.recipe)]
    app.push_screen(DraftChangedScreen(changes), on_result)


def _adopt(app: QloraApp, other_draft: Draft, other: Workbench) -> None:
    app.draft = other_draft
    app.workbench.adopt(other)
    app.recipe_edited()
    app.notify(f"Loaded the other app's recipe. Press {key_name('app.undo')} to restore yours.")
