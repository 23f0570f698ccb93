"""The window that shows a sweep, with the commands for the sweep."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical
from textual.content import Content
from textual.widgets import OptionList

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_loss, format_percent, uncapitalize
from qlora_tui.recipe.fields import setting_name
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import refuse_on_box
from qlora_tui.runs.holds import time_words
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.describe import (
    Bought,
    compared,
    effects_title,
    main_setting,
    ranked,
    round_loss,
    round_title,
    short_verdict,
    state_sentence,
    tie_sentence,
    trial_name,
    trial_progress,
    trial_value,
    trial_words,
    unequal_sentence,
    what_settings_bought,
)
from qlora_tui.sweeps.directory import SweepDir, all_sweeps
from qlora_tui.sweeps.study import importances
from qlora_tui.sweeps.view import Outcome, SweepView, Trial, read_sweep
from qlora_tui.tui.key_names import dialog_keys, key_name
from qlora_tui.tui.render.columns import Column, hanging, table
from qlora_tui.tui.render.plot import no_plot, plot
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen, TextPromptScreen, WorkerDialog, write_or_ask
from qlora_tui.tui.screens.presets.screen import save_as
from qlora_tui.tui.screens.runs.sweep_charts import UNCHANGED, WINNER, setting_lines, steps_plot
from qlora_tui.tui.widgets.controls import HEADING, Drawing, Lines, ViList

_INTERVAL_S = 2.0
"""Seconds between two reads of the sweep that is shown."""
_WORDS = 24
"""Minimum width, in cells, of the outcome column. The column is narrower only if all outcomes are shorter."""
_STYLES: dict[Outcome, str] = {
    "waiting": "$text-muted",
    "training": "bold $primary",
    "paused": "$warning",
    "reached": "",
    "dropped": "$text-muted",
    "finished": "$success",
    "failed": "$error",
    "stopped": "$text-muted",
}


@dataclass(frozen=True)
class _Shown:
    """A sweep, and the values computed from it for the window."""

    view: SweepView
    bought: tuple[Bought, ...]
    shares: dict[str, float]
    """Fraction (0 to 1) of the variation in loss that each setting explains, by path of the setting; empty if
    Optuna is not installed.
    """


def _read(sweep: SweepDir, before: _Shown | None) -> _Shown:
    """Read a sweep. If nothing has changed, return ``before``. Reads files, so call it in a thread. Raises
    UserError if the sweep cannot be read.
    """
    view = read_sweep(sweep)
    if before is not None and before.view == view:
        return before
    try:
        shares = importances(view)
    except UserError:  # Optuna is not installed
        shares = {}
    return _Shown(view, tuple(what_settings_bought(view)), shares)


class SweepScreen(WorkerDialog[None], OnQloraApp):
    """A window with a sweep: verdict, charts, trials, and the effect of each setting on the loss. Escape
    closes the window.
    """

    DEFAULT_CSS = """
    SweepScreen {
        /* The names of the screens stay in view. */
        #sweep {
            width: 100%;
            height: 100%;
            margin-top: 1;
            background: $background;
            padding: 0 1;
            &:nocolor {
                border: double $border;
            }
        }
        #sweep-verdict, #sweep-tables, #sweep-trials, #sweep-bought {
            height: auto;
        }
        #sweep-tables {
            layout: column;
            max-height: 60%;
            margin-top: 1;
        }
        #sweep-bought {
            margin-top: 1;
        }
        #sweep-charts {
            min-height: 7;
            max-height: 36;
        }
        .graph {
            width: 1fr;
        }
        #sweep-steps {
            display: none;
        }
        &.-very-wide {
            #sweep-steps {
                display: block;
                margin-left: 3;
            }
            #sweep-tables {
                layout: horizontal;
            }
            #sweep-trials {
                width: 1fr;
                max-height: 100%;
            }
            #sweep-bought {
                width: 76;
                margin: 0 0 0 3;
            }
        }
        &.-short {
            #sweep-tables {
                height: 1fr;
                max-height: 100%;
            }
            #sweep-bought {
                display: none;
            }
        }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("z", "pause", "Pause"),
        Binding("a", "add_time", "Add time"),
        Binding("s", "adopt", "Save"),
        Binding("x", "stop", "Stop"),
        Binding("n", "next", "Next"),
        Binding("y", "copy", "Copy"),
        Binding("escape,q", "dismiss", "Close"),
    ]

    def __init__(self, sweeps: Sequence[SweepDir], number: int = 0) -> None:
        """Create a window that first shows ``sweeps[number]``. ``sweeps``: at least one sweep, newest
        first.
        """
        super().__init__()
        self._sweeps, self._number = sweeps, number
        self._shown: _Shown | None = None
        self._is_due, self._is_reading = False, False

    @property
    def sweep(self) -> SweepDir:
        """The sweep that is shown."""
        return self._sweeps[self._number]

    def compose(self) -> ComposeResult:
        with Vertical(id="sweep", classes="frame"):
            yield Lines(id="sweep-verdict")
            with Horizontal(id="sweep-charts"):
                reading = partial(plot, no_plot("Reading the sweep…"))
                yield Drawing(reading, id="sweep-setting", classes="graph")
                yield Drawing(id="sweep-steps", classes="graph")
            with Container(id="sweep-tables"):
                yield ViList(id="sweep-trials")
                yield Lines(id="sweep-bought")

    def on_mount(self) -> None:
        self.query_one(ViList).focus()
        self.set_interval(_INTERVAL_S, self._refresh)
        self._refresh()

    def _refresh(self) -> None:
        """Read the sweep again. If a read is in progress, the next read begins when it ends: with hundreds of
        trials, a read can take longer than the interval between reads.
        """
        self._is_due = True
        if not self._is_reading:
            self._is_reading = True
            self._read_while_due()

    @work
    async def _read_while_due(self) -> None:
        while self._is_due:
            self._is_due, sweep = False, self.sweep
            try:
                shown = await asyncio.to_thread(_read, sweep, self._shown)
            except UserError as problem:
                self.dismiss()
                self.app.show_error(problem)
                return
            if sweep == self.sweep and shown != self._shown:
                self._shown = shown
                self._show(shown)
        self._is_reading = False

    def _show(self, shown: _Shown) -> None:
        view = shown.view
        place = f" ({self._number + 1} of {len(self._sweeps)})" if len(self._sweeps) > 1 else ""
        state = "" if view.ended is None else f" · {uncapitalize(state_sentence(view)).rstrip('.')}"
        dialog = self.query_one("#sweep", Vertical)
        dialog.border_title = Content(f"Sweep {self.sweep.id}{place}{state}")
        bindings = [each for each in self.BINDINGS if isinstance(each, Binding) and self._can(each.action)]
        if view.state != "running":
            bindings = [
                replace(each, description="Resume") if each.action == "pause" else each for each in bindings
            ]
        dialog.border_subtitle = dialog_keys(bindings, "Enter open")
        self.query_one("#sweep-verdict", Lines).show(partial(verdict_lines, view))
        path = main_setting(shown.bought, shown.shares) or next(iter(view.sheet.sweep.vary))
        self.query_one("#sweep-setting", Drawing).show(partial(setting_lines, view, path))
        self.query_one("#sweep-steps", Drawing).show(partial(plot, steps_plot(view)))
        self.query_one(ViList).show(partial(trial_lines, view, has_bar=not self.app.no_color))
        bought = partial(bought_lines, effects_title(view), shown.bought, shown.shares)
        self.query_one("#sweep-bought", Lines).show(bought)

    def _can(self, action: str) -> bool:
        """Return whether an action of the window has an effect on the sweep that is shown."""
        view = None if self._shown is None else self._shown.view
        match action:
            case "stop" | "pause":
                return view is not None and view.ended is None
            case "adopt":
                return view is not None and view.winner is not None
            case "next":
                return len(self._sweeps) > 1
        return True

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether an action is available. An action that would have no effect is not available."""
        return self._can(action) and super().check_action(action, parameters)

    async def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open the run of the selected trial on the Train screen."""
        event.stop()
        from qlora_tui.tui.screens.train.screen import show_run

        trials = self._shown.view.trials if self._shown is not None else ()
        trial = next((trial for trial in trials if str(trial.number) == event.option_id), None)
        if trial is None or trial.run is None:
            self.notify("This trial has no run: it was not queued yet, or its run was deleted.")
            return
        app = self.app
        self.dismiss()
        await show_run(app, trial.run)

    @work
    async def _change(self, change: Callable[[SweepDir], object], said: str) -> None:
        try:
            # In a thread, since the action writes a file for each run and waits for the process that plans
            # the next step.
            await asyncio.to_thread(change, self.sweep)
        except UserError as problem:
            self.app.show_error(problem)
        else:
            self.notify(said)
        self._refresh()

    def action_pause(self) -> None:
        """Pause the sweep if it is running; otherwise resume it."""
        if self._shown is not None and self._shown.view.state == "running":
            self._change(actions.pause, "The sweep pauses once its run has saved a checkpoint.")
        else:
            self._change(actions.resume, "The sweep continues.")

    def action_add_time(self) -> None:
        """Ask for a duration, and extend the sweep by that duration."""
        text = "Time to add, such as 2h or 90m. A sweep that has ended continues with further trials."
        prompt = TextPromptScreen("Add time", text, validate=partial(_wrong, actions.parse_duration))
        self.ask(prompt, self._add_time)

    async def _add_time(self, text: str) -> None:
        until = await asyncio.to_thread(actions.add_time, self.sweep, actions.parse_duration(text))
        self.notify(f"The sweep continues until {time_words(until)}.")
        self._refresh()

    def action_adopt(self) -> None:
        """Ask for a name, and save the winner's settings as a preset with that name."""
        view = self._shown.view if self._shown is not None else None
        winner = view.winner if view is not None else None
        if view is None or winner is None:
            return
        recipe, note = view.recipe_of(winner), f"Trial {winner.number} of the sweep {self.sweep.id}."
        text = f"Name of the preset with the settings of trial {winner.number}. Model and data are left out."
        prompt = TextPromptScreen("Save the winner as a preset", text)
        self.ask(prompt, lambda name: self._save(name, recipe, note))

    @work
    async def _save(self, name: str, recipe: Recipe, note: str) -> None:
        if name and await write_or_ask(
            self.app, lambda sure: save_as(name, recipe, note=note, overwrite=sure)
        ):
            self.notify(f"Saved as {name}. Press {key_name('app.presets')} to see your presets.")

    def action_stop(self) -> None:
        """Ask for confirmation, and stop the sweep."""
        text = (
            "The current run is saved and stopped, and the sweep's other runs leave the queue. Results are "
            "kept."
        )
        question = ConfirmScreen("Stop the sweep?", text, "Stop", "Continue")
        self.ask(question, lambda _yes: self._change(actions.stop, "The sweep is stopped."))

    def action_next(self) -> None:
        """Show the next older sweep; after the oldest, the newest."""
        self._number = (self._number + 1) % len(self._sweeps)
        self._shown = None
        self._refresh()

    def action_copy(self) -> None:
        """Copy the command that shows this sweep in a terminal."""
        self.app.copy_to_clipboard(f"qlora-tui sweep show {shlex.quote(self.sweep.id)}")


def verdict_lines(view: SweepView, width: int) -> list[Content]:
    """Return the verdict as a headline, followed by a line for each loss that the verdict compares, with its
    symbol in the charts. Until the sweep has ended, its state comes first. If there is a tie, or if trials
    had different numbers of tokens, further lines say so.
    """
    headline, why = short_verdict(view)
    style = "bold $success" if view.verdict.is_better and view.ended is not None else "bold"
    lines = [Content.styled(headline, style)]
    if view.ended is None:
        lines = [Content.styled(state_sentence(view), "bold"), Content(headline)]
    sides = compared(view)
    cells = max((len(side.name) for side in sides), default=0)
    for (symbol, symbol_style), side in zip((WINNER, UNCHANGED), sides, strict=False):
        parts = ((symbol, symbol_style), f" {side.name:<{cells}}  ", (format_loss(side.loss), "bold"))
        lines += hanging(Content.assemble(*parts, "  "), Content.styled(side.words, "$text-muted"), width)
    if why:
        lines.append(Content.styled(why, "$text-muted"))
    if tie := tie_sentence(view):
        lines.append(Content.styled(tie, "$text-muted"))
    if unequal := unequal_sentence(view):
        lines.append(Content.styled(unequal, "$warning"))
    return lines


def trial_lines(view: SweepView, width: int, *, has_bar: bool = True) -> list[tuple[str, Content]]:
    """Return (id, line) for a heading and for each trial. The line of a trial has its values, its loss in
    each round, its steps and its outcome. The list is empty if there are no trials. ``has_bar``: whether
    lines begin with a bar in the color of the outcome.
    """
    rounds, rows = view.rounds, ranked(view)
    if not rows:
        return []
    bar = Column[Trial](text=lambda trial: Content.styled("▌", _STYLES[trial.outcome]))
    columns = [
        *([bar] if has_bar else []),
        Column[Trial](text=partial(trial_name, view), title="trial", gap=1),
        *(
            Column[Trial](text=partial(trial_value, view, path=path), title=setting_name(path), max_width=24)
            for path in view.sheet.sweep.vary
        ),
        *(
            Column[Trial](
                text=partial(round_loss, view, number),
                title=round_title(view, number),
                right=True,
                dropped=0 if number == rounds else 1 + number,
                shown_if_empty=False,
            )
            for number in range(1, rounds + 1)
        ),
        Column[Trial](text=trial_progress, title="steps", right=True, dropped=1),
        Column[Trial](
            text=lambda trial: Content.styled(trial_words(view, trial), _words_style(view, trial)),
            fills=True,
            min_width=min(_WORDS, max(len(trial_words(view, trial)) for trial in rows)),
            is_sentence=True,
        ),
    ]
    heading, *lines = table(columns, rows, width)
    return [
        (f"{HEADING}trials", heading),
        *((str(trial.number), line) for trial, line in zip(rows, lines, strict=True)),
    ]


def _words_style(view: SweepView, trial: Trial) -> str:
    """Return the style of a trial's outcome. Among finished trials, only the winner has a color."""
    if trial.outcome != "finished":
        return _STYLES[trial.outcome]
    return "bold $success" if trial.number == view.verdict.winner else ""


def bought_lines(title: str, bought: Sequence[Bought], shares: dict[str, float], width: int) -> list[Content]:
    """Return a table with a line for each value of each setting. Each line gives the mean loss of the
    trials with its value, at the end of the first round. The list is empty if there are no losses yet.

    ``title``: title of the first column, see :func:`effects_title`.
    """
    first = {one.path: one for one in reversed(bought)}

    def once(text: Callable[[str], str], one: Bought) -> str:
        return text(one.path) if one is first[one.path] else ""

    columns = [
        Column[Bought](text=partial(once, setting_name), title=title),
        Column[Bought](text=lambda one: one.value, title="value"),
        Column[Bought](text=lambda one: str(one.trials), title="trials", right=True),
        Column[Bought](text=lambda one: format_loss(one.mean), title="mean loss", right=True),
        Column[Bought](
            text=partial(once, lambda path: format_percent(shares[path]) if path in shares else ""),
            title="share of variation",
            right=True,
            dropped=1,
            shown_if_empty=False,
        ),
    ]
    return table(columns, bought, width) if bought else []


def _wrong(parse: Callable[[str], object], text: str) -> str:
    """Return sentences that say why ``parse`` rejects a typed text; empty if it accepts the text."""
    try:
        parse(text)
    except UserError as problem:
        return f"{problem.what} {problem.fix}"
    return ""


def show_sweeps(screen: OnQloraApp, sweep_id: str = "") -> None:
    """Open the sweep with this id. If there is no such sweep, open the newest sweep; if there are no sweeps,
    notify the user. Raises UserError if the app shows another machine (``--host``).
    """
    refuse_on_box("Sweeps cannot be shown here", "sweep show last")
    sweeps = all_sweeps()
    if not sweeps:
        screen.app.notify(
            f"No sweeps yet. Press {key_name('train.sweep')} on the Train screen, before a launch."
        )
        return
    number = next((number for number, sweep in enumerate(sweeps) if sweep.id == sweep_id), 0)
    screen.app.push_screen(SweepScreen(sweeps, number))
