"""Dialogs that may open over any screen: confirmations, text prompts, list pickers, errors, and the check of
this machine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import msgspec
from textual import work
from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.events import Resize
from textual.markup import escape
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import abbreviate_home, format_number, format_path
from qlora_tui.recipe.fields import label_settings
from qlora_tui.recipe.presets import OverwriteError
from qlora_tui.tui.breakpoints import MIN_SIZE, is_too_small
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.labels import OUTCOME_SIGNS
from qlora_tui.tui.screens.base import CancelsWorkersFirst, Dialog, OnQloraApp
from qlora_tui.tui.widgets.controls import TextField, ViList, ViScroll

if TYPE_CHECKING:
    from qlora_tui.runs.doctor import Check
    from qlora_tui.tui.app import QloraApp


CHECK_INTERVAL_S = 1.0
"""Seconds between two checks of whether a question is outdated."""
_YES = Binding("y", "dismiss(True)", "Yes")
_ENTER = Binding("enter", "confirm", "Yes")
_NO = Binding("n,escape", "dismiss(False)", "No")
_MAX_CHANGES = 8
_NO_MATCH = "No line matches. Press Esc to show all."
_SHOWN_FIRST = ("error", "warning", "note", "ok")
_TESTING = "Testing the libraries on a few real weights. This takes a few seconds…"
DraftChoice = Literal["mine", "theirs"]
Answer = TypeVar("Answer")
Picked = TypeVar("Picked")


class WorkerDialog(Dialog[Picked], CancelsWorkersFirst):
    """A dialog that a worker may close, possibly while another screen covers the dialog."""

    _leave: Callable[[], object] | None = None
    """Closes the dialog. Set if :meth:`dismiss` was called while another screen covered the dialog; otherwise
    None.
    """

    def dismiss(self, result: Picked | None = None) -> AwaitComplete:
        """Close this dialog with its result. If another screen covers the dialog, close it once it is on top
        again.

        Textual's own method would close the screen on top instead of this dialog.
        """
        if self.is_active:
            return super().dismiss(result)
        self._leave = partial(self.dismiss, result)
        return AwaitComplete()

    def on_screen_resume(self) -> None:
        """Close the dialog if :meth:`dismiss` was called while another screen covered it."""
        if self._leave is not None:
            self._leave()


class TextDialog(Dialog[Answer | None]):
    """Dialog with a title, paragraphs, and the keys that close it. Returns the answer that belongs to the
    pressed key; None if the key has no answer.
    """

    CSS_PATH = Path(__file__).with_name("modal.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Close")]

    def __init__(self, title: str, *paragraphs: Widget, is_wide: bool = False) -> None:
        super().__init__()
        self._title = title
        self._paragraphs = paragraphs
        self._is_wide = is_wide

    def compose(self) -> ComposeResult:
        with ViScroll(classes="dialog wide" if self._is_wide else "dialog") as dialog:
            dialog.border_title = Content(self._title)
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield from self._paragraphs


class ConfirmScreen(WorkerDialog[bool | None]):
    """Question that returns True for yes, and False for no. Escape means no. Enter means yes if ``harmless``;
    otherwise, Enter does nothing.
    """

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [_YES, _ENTER, _NO]

    def __init__(
        self,
        title: str,
        text: str,
        yes: str = "Yes",
        no: str = "No",
        *,
        harmless: bool = False,
        is_outdated: Callable[[], bool] | None = None,
    ) -> None:
        """Create the question.

        Args:
            title: The question.
            text: The consequences of a yes.
            yes: What the key for yes does, in a few words.
            no: What the key for no does, in a few words.
            harmless: Whether nothing can be lost by answering yes. If so, Enter means yes.
            is_outdated: Called every second in a thread. Once it returns True, the answer is no.
        """
        super().__init__()
        self._is_outdated = is_outdated
        self._title = title
        self._text = text
        self._yes = yes
        self._no = no
        self._harmless = harmless

    def on_mount(self) -> None:
        if self._is_outdated is not None:
            self.set_interval(CHECK_INTERVAL_S, self._check_outdated)

    @work(exclusive=True)
    async def _check_outdated(self) -> None:
        if self._is_outdated is not None and await asyncio.to_thread(self._is_outdated):
            self.dismiss(False)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = self._title
            yes = replace(_ENTER if self._harmless else _YES, description=self._yes)
            dialog.border_subtitle = dialog_keys([yes, replace(_NO, description=self._no)])
            yield Static(self._text, markup=False)

    def action_confirm(self) -> None:
        """Answer yes if nothing can be lost."""
        if self._harmless:
            self.dismiss(True)


async def write_or_ask(app: QloraApp, write: Callable[[bool], object]) -> bool:
    """Call ``write(False)``. If this call raises OverwriteError, ask the user whether to replace what would
    be overwritten and, if the answer is yes, call ``write(True)``. Return whether something was written.

    Must be called in a worker. Raises any other UserError that ``write`` raises.
    """
    try:
        write(False)
    except OverwriteError as problem:
        text = f"{problem.what} {problem.why}".strip()
        question = ConfirmScreen(problem.title, text, yes="Replace it", no="Keep it")
        if not await app.push_screen_wait(question):
            return False
        write(True)
    return True


class TextPromptScreen(Dialog[str | None]):
    """Dialog that returns the typed text; None if it was canceled. ``validate`` takes the typed text, and
    returns a message that says what is wrong with it; empty if the typed text is valid.
    """

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(
        self, title: str, text: str, value: str = "", validate: Callable[[str], str] = lambda _: ""
    ) -> None:
        super().__init__()
        self._title = title
        self._text = text
        self._value = value
        self._validate = validate

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = escape(self._title)
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter apply")
            yield Static(self._text, markup=False)
            yield TextField(self._value, compact=True)
            yield Static("", id="prompt-error", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        wrong = self._validate(event.value)
        if wrong:
            self.query_one("#prompt-error", Static).update(f"✗ {wrong}")
        else:
            self.dismiss(event.value)


def ask_search(screen: OnQloraApp, things: str, before: str, show: Callable[[str], None]) -> None:
    """Ask for a search text, and pass it to ``show``. If the text is empty, ``show`` must show everything.

    Args:
        screen: The screen that asks.
        things: What is searched, as a plural noun, such as ``lines``.
        before: The current search text.
        show: Called with the search text, unless the user cancels.
    """
    text = f"Show only {things} that contain this text. Leave empty to show all."
    screen.ask(TextPromptScreen("Search", text, before), show)


def ask_gpu_size(app: QloraApp) -> None:
    """Ask for the memory of a GPU, and compare all estimates with this memory. If the answer is empty, use
    the memory of this machine again.
    """

    def on_result(text: str | None) -> None:
        if text is None:
            return
        size = float(text) if text.strip() else None
        app.settings = msgspec.structs.replace(app.settings, gpu_memory_gib=size)
        app.recipe_changed.publish(app.workbench.recipe)
        app.notify(f"Estimates are for {app.memory_budget.name}.")

    now = app.settings.gpu_memory_gib
    text = (
        "Memory of the GPU in GiB, such as 12 or 24. Leave empty to use this machine's GPU. The size is "
        "not saved."
    )
    value = "" if now is None else format_number(now)
    app.push_screen(TextPromptScreen("Assume another GPU size", text, value, _gpu_size_error), on_result)


def _gpu_size_error(text: str) -> str:
    """Return the error in a typed size in GiB; empty if the size is valid. Empty text is valid."""
    if not text.strip():
        return ""
    try:
        size = float(text)
    except ValueError:
        return "Enter a number of GiB, such as 12."
    return "" if size > 0 and math.isfinite(size) else "The size must be above 0."


class ErrorScreen(TextDialog[None]):
    """Dialog that shows an error. Escape, Enter or q closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "Close")]

    def __init__(self, problem: UserError) -> None:
        # One text, so that each setting's path is written once.
        texts = label_settings("\0".join((problem.what, problem.why, problem.fix))).split("\0")
        what, why, fix = map(abbreviate_home, texts)
        paragraphs = [Static(what, markup=False)]
        if why:
            paragraphs.append(Static(why, markup=False, classes="muted"))
        if fix:
            paragraphs.append(Static(f"▸ {fix}", markup=False, classes="fix"))
        super().__init__(problem.title, *paragraphs)


class DraftChangedScreen(TextDialog[DraftChoice]):
    """Asks which of two recipes to keep: this window's (``mine``), or the recipe that another window of the
    app has saved (``theirs``). Returns the choice; None to decide later, so that the next edit asks again.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "dismiss('mine')", "Keep mine"),
        Binding("t", "dismiss('theirs')", "Use theirs"),
        Binding("escape", "dismiss(None)", "Decide later"),
    ]

    def __init__(self, changes: list[str], aside: Path) -> None:
        """Create the question. ``changes``: the differences between this window's recipe and the other
        window's. ``aside``: path of a backup. Until the user chooses, it contains this window's recipe;
        afterwards, the recipe that was not chosen.
        """
        shown = changes[:_MAX_CHANGES]
        if len(changes) > _MAX_CHANGES:
            shown.append(f"and {len(changes) - _MAX_CHANGES} more")
        text = (
            f"Both recipes stay on disk. Until you choose, {format_path(aside)} contains your recipe; after "
            f"that, it contains the one that you did not choose. Changes from your recipe to the other one:"
        )
        listed = "\n".join(shown) or "The two recipes differ only in the presets that they started from."
        super().__init__(
            "Another window of the app changed the recipe",
            Static(text, markup=False),
            Static(listed, markup=False),
        )


class TooSmallScreen(Dialog[None]):
    """Covers any screen while the window is too small."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,escape", "dismiss", "Show it anyway")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "This window is too small"
            yield Static(markup=False)
            # These keys are in a line of text, which wraps. In the border, a narrow window would cut them
            # off.
            yield Static(dialog_keys(self.BINDINGS), markup=False, classes="fix")

    def on_resize(self, event: Resize) -> None:
        """Show the current size of the window, and close if the window is large enough."""
        size = event.size
        self.query(Static).first().update(
            f"The window is {size.width}×{size.height}; the screens need {MIN_SIZE.width}×{MIN_SIZE.height}. "
            "Enlarge the window or reduce the font size. Runs continue either way."
        )
        self._leave_if_large()

    def on_screen_resume(self) -> None:
        """Close if the window has become large enough while another dialog or screen covered this dialog."""
        self._leave_if_large()

    def _leave_if_large(self) -> None:
        if self.is_active and not is_too_small(self.app.size):
            self.dismiss()


@dataclass(frozen=True)
class Choice(Generic[Picked]):
    """An item of a list from which the user picks."""

    value: Picked
    """What the dialog returns if the user picks this item."""
    line: Content
    searched: str = ""
    """Additional text that the filter searches."""


class ListPicker(Dialog[Picked | None]):
    """Dialog with a list and a filter. Returns the value of the selected item; None if closed with Escape or
    q.
    """

    # Use an absolute path. A relative path would be resolved in the folder of the subclass.
    CSS_PATH = Path(__file__).with_name("modal.tcss")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter"),
        Binding("escape", "leave", "Close"),
        Binding("q", "dismiss(None)", show=False),
    ]

    def __init__(
        self,
        title: str,
        enter: str,
        choices: Sequence[Choice[Picked]],
        *,
        empty: str = "",
        selected: Picked | None = None,
        is_wide: bool = False,
    ) -> None:
        """Create the dialog.

        Args:
            title: The title.
            enter: What Enter does, in one or two words.
            choices: The items.
            empty: Text to show if there are no items.
            selected: Value of the item on which the cursor begins; None for the first item.
            is_wide: Whether the dialog must be wide, since its lines are long.
        """
        super().__init__()
        self.choices = choices
        self._title, self._enter, self._empty, self._is_wide = title, enter, empty, is_wide
        self._selected = next((n for n, choice in enumerate(choices) if choice.value == selected), 0)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide" if self._is_wide else "dialog") as dialog:
            dialog.border_title = Content(self._title)
            own = [] if self.BINDINGS is ListPicker.BINDINGS else self.BINDINGS
            dialog.border_subtitle = dialog_keys([*own, *ListPicker.BINDINGS], f"Enter {self._enter}")
            yield TextField(placeholder="Part of a line", compact=True, id="picker-filter")
            yield ViList()
            yield Static(self._empty, markup=False)

    def on_mount(self) -> None:
        self.query_one(TextField).display = False
        self.show_choices(self._selected)
        self.query_one(ViList).focus()

    def show_choices(self, select: int | None = None) -> None:
        """Show the items that match the filter. ``select``: index of the item that gets the cursor; None to
        leave the cursor on its item.
        """
        text = self.query_one(TextField).value.casefold()
        matching = [
            (str(number), choice.line)
            for number, choice in enumerate(self.choices)
            if text in choice.line.plain.casefold() or text in choice.searched.casefold()
        ]
        list_, note = self.query_one(ViList), self.query_one(Static)
        list_.show(matching, None if select is None else str(select))
        list_.display, note.display = bool(matching), not matching
        note.update(_NO_MATCH if text else self._empty)

    @property
    def current(self) -> Picked | None:
        """The value of the item under the cursor; None if no item matches."""
        current = self.query_one(ViList).current
        return None if current is None else self.choices[int(current)].value

    def action_filter(self) -> None:
        """Show and focus the filter."""
        self.query_one(TextField).display = True
        self.query_one(TextField).focus()

    def action_leave(self) -> None:
        """Clear and hide the filter if it is shown; otherwise, close the dialog."""
        field = self.query_one(TextField)
        if not field.display:
            self.dismiss(None)
            return
        field.value = ""
        field.display = False
        self.query_one(ViList).focus()

    def on_input_changed(self) -> None:
        """Show only the items that match the text typed in the filter."""
        self.show_choices()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Move the focus from the filter to the list, and hide the filter if it is empty."""
        event.input.display = bool(event.value)
        self.query_one(ViList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Close the dialog with the value of the selected item."""
        self.dismiss(self.choices[int(event.option_id or 0)].value)


class MachineReportScreen(TextDialog[None], CancelsWorkersFirst):
    """Dialog with the checks of this machine: the conclusion, problems, and passed checks, in this order. The
    dialog opens with the checks of the system. Checks of the libraries are added when the process that runs
    them has ended.
    """

    def __init__(self) -> None:
        super().__init__("Can this machine train?", Static("Checking…", id="machine-report"))

    def on_mount(self) -> None:
        self._check()

    @work
    async def _check(self) -> None:
        from qlora_tui.runs import doctor  # no other dialog needs this module

        checks = await asyncio.to_thread(doctor.check_system)
        self._show(checks, Content.styled(_TESTING, "dim"))
        checks += await asyncio.to_thread(doctor.check_libraries)
        if any(check.outcome == "error" for check in checks):
            conclusion = Content.styled("Not ready to train: fix the errors below.", "bold $error")
        else:
            conclusion = Content.styled("Ready to train.", "bold $success")
        self._show(checks, conclusion)

    def _show(self, checks: Sequence[Check], conclusion: Content) -> None:
        lines = [conclusion, Content("")]
        for check in sorted(checks, key=lambda check: _SHOWN_FIRST.index(check.outcome)):
            sign, style = OUTCOME_SIGNS[check.outcome]
            lines.append(
                Content.assemble(
                    (f"{sign:<10}", style), (f"{check.label}: ", "bold"), abbreviate_home(check.text)
                )
            )
            if check.fix:
                lines.append(Content.styled(f"  ▸ {abbreviate_home(check.fix)}", "$primary"))
        self.query_one("#machine-report", Static).update(Content("\n").join(lines))
