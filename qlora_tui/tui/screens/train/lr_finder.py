"""A window that tries rising learning rates on the recipe, shows the loss at each, and offers one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.lr_range import LrRange, RangeSettings
from qlora_tui.runs.lr_range_job import measure_lr_range, read_stored
from qlora_tui.runs.lr_suggestion import RangeCurve, format_rate, read_curve
from qlora_tui.runs.measuring import MeasuringStoppedError, StopSwitch
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.lr_plot import lr_plot
from qlora_tui.tui.widgets.graph import Graph
from qlora_tui.visible import visible

_ENTER = Binding("enter", "accept", "Start")
_AGAIN = Binding("r", "measure", "Measure again")
_CLOSE = Binding("escape", "leave", "Close")
_SETTINGS = RangeSettings()
_PRICE = (
    f"Trains this recipe for at most {_SETTINGS.steps} steps while the rate rises from "
    f"{format_rate(_SETTINGS.low)} to {format_rate(_SETTINGS.high)}, and computes each batch once before. "
    "That takes about as long as 80 steps of a run, and its memory. Recipe and runs stay as they are."
)
_SHORT = "A run of many steps may need a lower rate than so short a test, one of few steps a higher one."


class LrFinderScreen(ModalScreen[float]):
    """Returns the rate to use; None when closed without one. Closing it ends the test."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [_ENTER, _AGAIN, _CLOSE]

    class Progressed(Message):
        """The test has come further."""

        def __init__(self, done: int, total: int, so_far: LrRange) -> None:
            super().__init__()
            self.done = done
            self.total = total
            self.so_far = so_far

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self._switch: StopSwitch | None = None
        """Of the test in progress."""
        self._lr_range: LrRange | None = None
        self._curve: RangeCurve | None = None
        """Of the complete test that is shown."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide tall") as dialog:
            dialog.border_title = "Learning-rate finder"
            yield Graph("No test of this recipe yet.")
            yield Static(id="lr-text", markup=False)

    def on_mount(self) -> None:
        stored = read_stored(self._recipe)
        if stored is None:
            self._say(_PRICE)
        else:
            self._show_result(stored)
        self._show_keys()

    def action_accept(self) -> None:
        """Use the suggested rate; before there is a test, start one."""
        if self._switch is not None:
            return
        if self._curve is None:
            self._measure()
        elif self._curve.suggested is not None:
            self.dismiss(self._curve.suggested)

    def action_measure(self) -> None:
        """Start a test."""
        if self._switch is None:
            self._measure()

    def action_leave(self) -> None:
        """Close, and end the test in progress."""
        if self._switch is not None:
            self._switch.stop()
        self.dismiss(None)

    @work(exclusive=True)
    async def _measure(self) -> None:
        self._switch = switch = StopSwitch()
        self._curve = None
        self._show_keys()
        self._draw(LrRange(settings=_SETTINGS, measured_at=time.time()), "Loading the model.")
        self._say("Loading the model. Closing this window ends the test and leaves nothing.")

        def on_progress(done: int, total: int, so_far: LrRange) -> None:
            self.post_message(self.Progressed(done, total, so_far))

        try:
            self._show_result(
                await asyncio.to_thread(measure_lr_range, self._recipe, _SETTINGS, on_progress, switch)
            )
        except MeasuringStoppedError:
            return
        except UserError as problem:
            self._say(" ".join(filter(None, (f"{problem.title}.", problem.what, problem.why, problem.fix))))
        finally:
            # Leaving the app cancels this worker, but not its thread, for whose end the app would wait.
            switch.stop()
            self._switch = None
        self._show_keys()

    def on_lr_finder_screen_progressed(self, event: Progressed) -> None:
        """Draw the test so far."""
        if self._switch is None:
            return
        steps, half = event.so_far.steps, event.total // 2
        now = f"Loss of each batch before training: {event.done:,} of {half:,}."
        if steps:
            now = f"Step {len(steps):,} of at most {half:,} at {format_rate(steps[-1].rate)}."
        self._draw(event.so_far, now)
        self._say(f"{now} Closing this window ends the test and leaves nothing.")

    def _show_result(self, lr_range: LrRange) -> None:
        self._curve = read_curve(lr_range)
        self._draw(lr_range, "No step has a finite loss.")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(lr_range.measured_at))
        ended = "; it ended where the loss diverged" if lr_range.diverged else ""
        facts = f"Measured {when}: {len(lr_range.steps)} steps in {lr_range.seconds:.0f} s{ended}."
        self._say(f"{self._curve.sentence} {_SHORT if self._curve.suggested else ''}\n{facts}")

    def _draw(self, lr_range: LrRange, empty: str) -> None:
        curve = read_curve(lr_range)
        rate = self._recipe.training.learning_rate
        self.query_one(Graph).show(lr_plot(curve, lr_range.settings, rate, empty))

    def _say(self, text: str) -> None:
        self.query_one("#lr-text", Static).update(visible(text))

    def _show_keys(self) -> None:
        keys = [_CLOSE]
        if self._switch is not None:
            keys = [replace(_CLOSE, description="Stop and close")]
        elif self._curve is None:
            keys = [_ENTER, _CLOSE]
        elif self._curve.suggested is None:
            keys = [_AGAIN, _CLOSE]
        else:
            use = replace(_ENTER, description=f"Use {format_rate(self._curve.suggested)}")
            keys = [use, _AGAIN, _CLOSE]
        self.query_one(".dialog").border_subtitle = dialog_keys(keys)
