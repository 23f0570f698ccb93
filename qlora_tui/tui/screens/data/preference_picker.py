"""Selects how to train on preference data: a method that compares answers, or the better ones alone."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.recipe.schema import Preferences
from qlora_tui.tui.screens.modals.list_picker import ListPicker

_PAIRS: dict[Preferences, tuple[str, str]] = {
    "orpo": ("ORPO", "learn the chosen answers, and to prefer them"),
    "dpo": ("DPO", "prefer the chosen answers, near the base model"),
    "simpo": ("SimPO", "as DPO without the base model: shorter steps"),
}
_RATED: dict[Preferences, tuple[str, str]] = {
    "kto": ("KTO", "prefer good answers to bad ones, near the base"),
}
_BETTER_ONLY = "train on these answers as if they were all"


class PreferencePickerScreen(ListPicker[Preferences]):
    """Returns a value of ``data.preferences``; None when closed with Escape."""

    ENTER = "choose"
    DIALOG_CLASSES = "dialog wide"

    def __init__(self, *, rated: bool) -> None:
        """``rated``: the answers are rated, not compared in pairs."""
        super().__init__()
        self.HEADING = "Good and bad answers" if rated else "Chosen and rejected answers"
        better: dict[Preferences, tuple[str, str]] = {
            "chosen": ("good only" if rated else "chosen only", _BETTER_ONLY)
        }
        self._choices = (_RATED if rated else _PAIRS) | better

    def lines(self) -> list[tuple[str, Content]]:
        return [
            (choice, Content.assemble((f"{name:<12}", "bold"), (text, "dim")))
            for choice, (name, text) in self._choices.items()
        ]

    def picked(self, id_: str) -> Preferences:
        return next(choice for choice in self._choices if choice == id_)
