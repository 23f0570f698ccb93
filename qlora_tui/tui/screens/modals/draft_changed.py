"""Asks whose recipe to keep when another app has changed the draft; ``draft_saving`` opens it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.formatting import format_path
from qlora_tui.tui.key_names import dialog_keys

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

    def __init__(self, changes: list[str], aside: Path) -> None:
        super().__init__()
        self._changes = changes
        self._aside = aside
        """File with the recipe that is not chosen."""

    def compose(self) -> ComposeResult:
        shown = self._changes[:_MAX_LINES]
        if len(self._changes) > _MAX_LINES:
            shown.append(f"and {len(self._changes) - _MAX_LINES} more")
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Another app changed the recipe"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static(
                f"Both stay on the disk: yours is in {format_path(self._aside)} until you choose, and then "
                "the one that you did not choose. Changes from yours to theirs:",
                markup=False,
            )
            yield Static("\n".join(shown) or "Only the preset it started from differs.", markup=False)
