"""The dialog with suggested settings and their reasons. The user ticks the settings to apply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.fields import replace_settings
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.suggestion_facts import read_facts
from qlora_tui.runs.suggestions import Suggestion, SuggestionFacts, Topic, suggest
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import OnQloraApp, WorkScreen
from qlora_tui.tui.screens.modals.dialogs import WorkerDialog
from qlora_tui.tui.threads import Measurement
from qlora_tui.tui.widgets.controls import ViList

_INDENT = 2
"""Width of the mark before a setting, in cells."""
_LABEL = 17
"""Width of a setting's label, in cells."""
_READING = "Checking the data, the memory and earlier runs…"


class SuggestScreen(WorkerDialog[tuple[Suggestion, ...] | None], OnQloraApp):
    """Dialog that returns the ticked suggestions; None if the dialog was closed without an answer, or if no
    suggestion is ticked.
    """

    CSS_PATH = Path(__file__).parents[1] / "modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "tick", "Tick"),
        Binding("escape,q", "dismiss(None)", "Close"),
    ]

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        super().__init__()
        self._recipe, self._machine = recipe, machine
        self._reading = Measurement(self._show_progress)
        self._facts: SuggestionFacts | None = None
        self._suggestions: tuple[Suggestion, ...] = ()
        self._under_cursor: str | None = None
        self._kept: frozenset[Topic] = frozenset()
        """Topics of the suggestions that the user has unticked. Their settings keep the recipe's values, and
        the other suggestions are derived for those values.
        """
        self._derived_for: frozenset[Topic] = self._kept
        """The value that ``_kept`` had when ``_suggestions`` were derived."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = "Suggested settings"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter apply ●")
            yield Static(_READING, id="suggest-progress", markup=False)
            yield ViList(id="suggest-list")

    def on_mount(self) -> None:
        self.query_one(ViList).display = False
        self._read()

    def _show_progress(self) -> None:
        self.query_one("#suggest-progress", Static).update(self._reading.progress or _READING)

    @work(exclusive=True)
    async def _read(self) -> None:
        def read(say: Callable[[str], None], should_stop: Callable[[], bool]) -> SuggestionFacts:
            return read_facts(
                self._recipe,
                self._machine,
                lambda progress: say(f"{progress.done}% of the samples counted"),
                should_stop,
            )

        try:
            self._facts = await self._reading.run(read, _READING)
            if self._facts is not None:
                self._suggestions = await asyncio.to_thread(suggest, self._facts)
        except UserError as problem:
            self.dismiss(None)
            self.app.show_error(problem)
            return
        self.query_one("#suggest-progress").display = False
        self.query_one(ViList).display = True
        self.query_one(ViList).focus()
        # Draw after the layout, which sets the width of the list.
        self.call_after_refresh(self._show)

    def _show(self) -> None:
        self.query_one(ViList).show(self._lines)

    def _lines(self, width: int) -> list[tuple[str, Content]]:
        # A short window has room for all settings, but for only one reason at a time.
        is_short = self.has_class("-short")
        return [
            (
                one.topic,
                suggestion_line(
                    one,
                    width,
                    is_ticked=one.topic not in self._kept,
                    with_reason=not is_short or one.topic == self._under_cursor,
                ),
            )
            for one in self._suggestions
        ]

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Draw the list again: in a short window, only the suggestion under the cursor has its reason."""
        if event.option_id != self._under_cursor:
            self._under_cursor = event.option_id
            self._show()

    def action_tick(self) -> None:
        """Toggle the tick of the suggestion under the cursor, and derive the other suggestions again. A
        suggestion that changes nothing has no tick.
        """
        topic = cast("Topic | None", self.query_one(ViList).current)
        if any(suggestion.topic == topic and suggestion.changes for suggestion in self._suggestions):
            self._kept ^= {cast("Topic", topic)}
            self._show()
            self._derive()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Close the dialog and return the ticked suggestions. If ticks have changed, derive the suggestions
        again first.
        """
        event.stop()
        if self._derived_for == self._kept:
            self._answer()
        else:
            self._derive(then=self._answer)

    @work(exclusive=True)
    async def _derive(self, then: Callable[[], None] | None = None) -> None:
        kept = self._kept
        if self._facts is None:
            return
        try:
            self._suggestions = await asyncio.to_thread(suggest, self._facts, kept)
        except UserError as problem:
            self.dismiss(None)
            self.app.show_error(problem)
            return
        self._derived_for = kept
        self._show()
        if then is not None:
            then()

    def _answer(self) -> None:
        chosen = tuple(one for one in self._suggestions if one.changes and one.topic not in self._kept)
        if chosen:
            self.dismiss(chosen)
        else:
            self.notify("No suggestion is selected, so nothing changes.")
            self.dismiss(None)


def suggestion_line(suggestion: Suggestion, width: int, *, is_ticked: bool, with_reason: bool) -> Content:
    """Return a suggestion as text, such as ``● Rank   16 → 32``, followed by the reason if ``with_reason``. A
    mark shows whether the suggestion is ticked.
    """
    if suggestion.changes:
        mark, style = ("●", "bold $primary") if is_ticked else ("○", "$text-muted")
    else:
        mark, style = ("✓", "$success") if suggestion.is_known else ("–", "$text-muted")
    head = Content.assemble(
        (f"{mark:<{_INDENT}}", style),
        (f"{suggestion.label:<{_LABEL}}", "bold"),
        (suggestion.change, style if suggestion.changes else ""),
    )
    if not with_reason:
        return head
    reason = Content.styled(suggestion.sourced_reason, "dim").wrap(max(20, width - _INDENT - 1))
    return Content("\n").join([head, *(Content(" " * _INDENT) + line for line in reason)])


def suggest_settings(screen: WorkScreen) -> None:
    """Open the dialog for the recipe that is being edited, and apply the suggestions that the user ticks. The
    change can be undone.
    """
    app = screen.app

    def apply(chosen: tuple[Suggestion, ...]) -> None:
        recipe = app.workbench.recipe
        for suggestion in chosen:
            recipe = replace_settings(recipe, suggestion.changes)
        if app.workbench.replace(recipe):
            app.recipe_edited()
            screen.notify_undoable(f"{pluralize(len(chosen), 'suggestion')} applied.")

    screen.ask(SuggestScreen(app.workbench.recipe, app.system_status.machine), apply)
