"""The dialog that starts a sweep: the settings to vary, and the number of trials or the deadline."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Input, Static

from qlora_tui.errors import UsageError, UserError
from qlora_tui.formatting import format_rate
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import refuse_on_box
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.expected_time import forecast
from qlora_tui.runs.preflight import preflight
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.describe import plan_ahead, plan_sentence
from qlora_tui.sweeps.directory import SweepDir, all_sweeps
from qlora_tui.sweeps.plan import Costs
from qlora_tui.sweeps.sheet import AUTO_ROUNDS, Sheet, Sweep
from qlora_tui.sweeps.space import parse_vary
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import WorkerDialog
from qlora_tui.tui.screens.runs.sweep import SweepScreen
from qlora_tui.tui.widgets.controls import TextField

_RATES = (1 / 4, 4.0)
"""Ends of the proposed range of learning rates, as multiples of the recipe's learning rate."""


@dataclass(frozen=True)
class Draft:
    """The sweep that the text in the dialog describes."""

    sheet: Sheet
    deadline: float | None
    """Unix time at which the sweep ends; None if a number of trials was given."""


def parse_draft(recipe: Recipe, vary: str, end: str) -> Draft:
    """Parse and check the fields of the dialog. Raises UserError if a field is not valid.

    Args:
        recipe: The recipe that the trials start from.
        vary: One or more ``FIELD=VALUES``, separated by semicolons.
        end: When the sweep ends: ``8 trials``, ``3h`` or ``until 07:00``.
    """
    words, deadline, trials = end.split(), None, 0
    if len(words) == 2 and words[0] == "until":
        deadline = actions.parse_until(words[1])
    elif words and words[0].isdecimal() and words[1:] in ([], ["trials"], ["trial"]):
        trials = int(words[0])
    elif words:
        deadline = time.time() + actions.parse_duration("".join(words))
    space = dict(parse_vary(part) for part in vary.split(";") if part.strip())
    if not space:
        raise UsageError(
            "Nothing to vary", what="No setting is named.", fix="Write, for example, lora.rank=8,16,32."
        )
    if not 0 <= trials <= 1000:
        raise UsageError(
            "Too many trials", what=f"{trials:,} trials are too many.", fix="Write at most 1,000."
        )
    sheet = Sheet(recipe=recipe, sweep=Sweep(vary=space, trials=trials))
    if trials and sheet.is_safe_to_halve:
        sheet = Sheet(recipe=recipe, sweep=Sweep(vary=space, trials=trials, rounds=_rounds(trials)))
    actions.check(sheet, has_time=deadline is not None)
    return Draft(sheet, deadline)


def _rounds(trials: int) -> int:
    """Return the number of halving rounds for a number of trials, at most :data:`AUTO_ROUNDS`."""
    return max(1, min(AUTO_ROUNDS, math.ceil(math.log2(trials)) if trials > 1 else 1))


def draft_sentence(draft: Draft, costs: Costs | None) -> str:
    """Return sentences that describe the runs of the sweep and their expected time. If the number of trials
    or the time is unknown, the sentences say why. ``costs``: the time that a run takes; None if unknown.
    """
    sheet = draft.sheet
    why = "" if sheet.is_safe_to_halve else " Several rounds need LR scheduler wsd or constant."
    plan = plan_ahead(sheet, draft.deadline, costs)
    if isinstance(plan, str):
        return plan if costs is not None else f"{plan}{why}"
    return f"{plan_sentence(sheet, plan.trials, plan.rounds, costs)}{why}"


class StartSweepScreen(WorkerDialog[Draft | None], OnQloraApp):
    """Dialog that returns the sweep to start; None if closed with Escape."""

    CSS_PATH = Path(__file__).parents[1] / "modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        super().__init__()
        self._recipe, self._machine = recipe, machine
        self._costs: Costs | None = None

    def compose(self) -> ComposeResult:
        rate = self._recipe.training.learning_rate
        ranks = sorted(
            {max(1, self._recipe.lora.rank // 2), self._recipe.lora.rank, self._recipe.lora.rank * 2}
        )
        vary = (
            f"training.learning_rate={format_rate(rate * _RATES[0])}..{format_rate(rate * _RATES[1])}:log; "
            f"lora.rank={','.join(map(str, ranks))}"
        )
        with VerticalScroll(classes="dialog wide", can_focus=False) as dialog:
            dialog.border_title = "Find better settings"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Tab next field", "Enter start")
            yield Static(
                "Trains variations of this recipe, and tests whether the best leads by more than chance.\n\n"
                "Vary: settings with a range or values, separated by semicolons",
                markup=False,
            )
            yield TextField(vary, id="sweep-vary", compact=True)
            yield Static("\nLength: 8 trials, 3h, or until 07:00", markup=False)
            yield TextField("8 trials", id="sweep-end", compact=True)
            yield Static("", id="sweep-plan", markup=False)

    def on_mount(self) -> None:
        self._measure()
        self._show_plan()

    @work
    async def _measure(self) -> None:
        expected = await asyncio.to_thread(forecast, self._recipe, self._machine)
        if expected is not None and expected.time is not None:
            self._costs = Costs(expected.time.seconds, 0.0)
            self._show_plan()

    def on_input_changed(self) -> None:
        """Show the sentences about the sweep or, if a field has an error, the error."""
        self._show_plan()

    def _show_plan(self) -> None:
        try:
            text = draft_sentence(self._draft(), self._costs)
        except UserError as problem:
            text = f"✗ {problem.what} {problem.fix}"
        self.query_one("#sweep-plan", Static).update(f"\n{text}")

    def _draft(self) -> Draft:
        vary, end = (self.query_one(name, Input).value for name in ("#sweep-vary", "#sweep-end"))
        return parse_draft(self._recipe, vary, end)

    def on_input_submitted(self) -> None:
        """If both fields are valid, close the dialog and return the sweep; otherwise, show the error."""
        try:
            self.dismiss(self._draft())
        except UserError:
            self._show_plan()


def start_sweep(screen: OnQloraApp) -> None:
    """Open the dialog, start the sweep that the user describes, and show the sweep. Raises UserError if the
    app shows another machine (``--host``).
    """
    refuse_on_box("Sweeps cannot be started from here", "sweep start RECIPE --vary …")
    app, machine = screen.app, screen.app.system_status.machine
    recipe = with_absolute_paths(app.workbench.recipe)

    async def start(draft: Draft) -> None:
        def create() -> SweepDir:
            for check in preflight(recipe, machine):
                if check.problem is not None:
                    raise check.problem
            return actions.start(draft.sheet, draft.deadline)

        sweep = await asyncio.to_thread(create)
        app.push_screen(SweepScreen([sweep, *(each for each in all_sweeps() if each != sweep)]))

    screen.ask(StartSweepScreen(recipe, machine), start)
