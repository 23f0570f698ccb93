"""Comparison of two to four runs: a graph of their losses by tokens trained, a table of results, and the
settings that differ.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import ClassVar, Literal

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from qlora_tui.formatting import (
    format_duration,
    format_loss,
    format_nats,
    format_percent,
    format_progress,
    format_speed,
    truncate_middle,
)
from qlora_tui.recipe.fields import DESCRIPTIVE, fields, format_value, get_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.describe import general_answer_texts
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed
from qlora_tui.runs.view import RunView
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.plot import Axis, Curve, Plot, loss_axis, no_plot, overall, plot, so_far
from qlora_tui.tui.render.series import DecimatedSeries, Envelope, smooth, smoothing_window
from qlora_tui.tui.screens.modals.dialogs import WorkerDialog
from qlora_tui.tui.screens.runs.run_list import MARKS
from qlora_tui.tui.widgets.controls import Drawing

MAX_COMPARED = len(MARKS)
_STEPS = 800
_STYLES = ("$training", "$forgetting", "$validation", "$hardware")


@dataclass(frozen=True)
class Outcome:
    """One result of a run, such as its speed. It is shown as one cell of the comparison table."""

    text: str
    """The result as text; empty if the run has no such result."""
    value: float | None = None
    better: Literal["", "lower", "higher"] = ""
    """Whether lower or higher values are better; empty if neither is better."""
    of_data: bool = True
    """Whether values are comparable only if the runs used the same data."""


@dataclass(frozen=True)
class ComparedRun:
    """A run to compare with other runs."""

    name: str
    recipe: Recipe | None
    envelope: Envelope
    """Smoothed training loss, by tokens trained."""
    outcome: Mapping[str, Outcome]
    """Results by the label of their row. If no compared run has a result for a row, the row is not shown."""


_GENERAL_ANSWERS = {
    "complete answers": "ended",
    "looping answers": "looping",
    "refusals": "refused",
    "valid JSON": "valid JSON",
}
"""Labels of the counts in the result of :func:`.general_answer_texts`, by the label of the count's row in the
table of compared runs.
"""
_DATA_SETTINGS = ("data.sources", "data.validation_path")
_BETTER = " ✓"
"""Mark after the best value in a row."""
_REASON_LINES = 3
_WIDE_COLUMN = 26


def read(run: RunDir) -> ComparedRun:
    """Read what the comparison shows about a run. Reads files, so call it in a thread."""
    view, _ = RunView.from_sample(run, _STEPS)
    series = view.series
    mean_losses = DecimatedSeries()
    mean_losses.extend(series.tokens, smooth(series.loss, smoothing_window(len(series))))
    recipe = run.readable_recipe()
    speed = sorted(series.tokens_per_s)[len(series) // 2] if len(series) else None
    best, last = view.best, view.last_evaluation
    general = dict(general_answer_texts(view.general_answers))
    margin = None if last is None else last.reward_margin
    best_text = "NA" if best is None or best.loss is None else f"{format_loss(best.loss)} at {best.step:,}"
    better_before = "" if view.loss_to_beat is None else f"{format_loss(view.loss_to_beat)}, better"
    outcome = {
        "state": Outcome(view.status.state),
        "best validation loss": Outcome(best_text, best.loss if best else None, "lower"),
        "before training": Outcome(better_before),
        "exact answers": _share(view.accuracy),
        "exact, base model": Outcome(_share(view.base_accuracy).text),
        "better answer preferred": _share(None if last is None else last.reward_accuracy),
        "margin": Outcome("" if margin is None else format_nats(margin), margin, "higher"),
        "forgetting": Outcome(
            "" if view.forgetting is None else format_nats(view.forgetting),
            view.forgetting,
            "lower",
            of_data=False,
        ),
        **{label: Outcome(general.get(name, "")) for label, name in _GENERAL_ANSWERS.items()},
        "steps": Outcome(format_progress(view.step, view.total_steps)),
        "tok/s": Outcome(format_speed(speed), speed, "higher", of_data=False),
        "trained": Outcome(format_duration(series.seconds()) if len(series) else "NA"),
        "reason": Outcome(_reason(view)),
    }
    return ComparedRun(run.name, recipe, mean_losses.envelopes()[0], outcome)


def _share(part: float | None) -> Outcome:
    return Outcome("" if part is None else format_percent(part), part, "higher")


def _reason(view: RunView) -> str:
    """Return why the run failed or was lost; empty if it did not."""
    if isinstance(view.ending, Failed):
        return f"{view.ending.title}: {view.ending.what}"
    return view.status.detail if view.status.state in ("failed", "lost") else ""


def compare_plot(compared: Sequence[ComparedRun]) -> Plot:
    """Return the plot of the losses by tokens trained, with a curve and a letter for each run."""
    envelopes = [one.envelope for one in compared]
    reach = overall(envelopes)
    most = max((envelope.xs[-1] for envelope in envelopes if envelope.xs), default=1.0)
    return Plot(
        x=so_far(most, most, "tokens"),
        y=loss_axis(*reach) if reach else Axis(0.0, 1.0, "loss"),
        curves=tuple(
            Curve(one.envelope, one.name, style, mark, words=f"{mark} {one.name}")
            for one, style, mark in zip(compared, _STYLES, MARKS, strict=False)
        ),
        legend=(("(training, smoothed)", "dim"),),
        empty="None of these runs has a step yet.",
    )


def differing(compared: Sequence[ComparedRun]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (label, values) for each setting that differs between runs. The values are in the order of the
    runs.
    """
    recipes = [one.recipe for one in compared]
    rows = []
    for path, field in fields().items():
        if path in DESCRIPTIVE:
            continue
        values = tuple("unreadable" if r is None else format_value(get_setting(r, path)) for r in recipes)
        if path == "model.id":
            # If another run names the same model only by its folder name, show only the folder name here too.
            values = tuple(name if (name := Path(value).name) in values else value for value in values)
        if len(set(values)) > 1:
            rows.append((field.label, values))
    return rows


def comparison_table(compared: Sequence[ComparedRun], width: int) -> Content:
    """Return a table with one column per run: names, results, and the settings that differ."""
    warning = _incomparable(compared)
    outcomes = [
        (name, texts)
        for name in compared[0].outcome
        if any(texts := _marked([one.outcome[name] for one in compared], same_data=not warning))
    ]
    settings = differing(compared)
    rows = outcomes + settings
    label = max(len(name) for name, _ in rows) + 2
    each = max(12, (width - label) // len(compared))
    names = [
        Content.styled(f"{mark} {truncate_middle(one.name, each - 3):<{each - 2}}", f"bold {style}")
        for one, mark, style in zip(compared, MARKS, _STYLES, strict=False)
    ]
    is_marked = any(text.endswith(_BETTER) for _, texts in outcomes for text in texts)
    head = f"{_BETTER.strip()} the better value" if is_marked else ""
    lines = [Content.styled(f"{head:<{label}}", "dim") + Content("").join(names)]
    if warning:
        lines.append(Content.styled(warning, "$warning"))
    for name, values in rows:
        for number, cells in enumerate(_cells(name, values, each - 1)):
            styles = ["bold $success" if cell.endswith(_BETTER) else "" for cell in cells]
            styled = [(f"{cell:<{each}}", style) for cell, style in zip(cells, styles, strict=True)]
            lines.append(Content.assemble((f"{'' if number else name:<{label}}", "dim"), *styled))
    if not settings:
        lines.append(Content.styled("Their settings are identical.", "dim"))
    return Content("\n").join(lines)


def _incomparable(compared: Sequence[ComparedRun]) -> str:
    """Return a sentence that says why the losses are not comparable; empty if they are comparable."""
    recipes = [one.recipe for one in compared if one.recipe is not None]
    if len({tuple(str(get_setting(each, path)) for path in _DATA_SETTINGS) for each in recipes}) > 1:
        return "Trained on different data: don't compare the losses."
    if len({each.preference_method for each in recipes}) > 1:
        return "Trained by different methods (Preference data): don't compare the losses."
    return ""


def _marked(outcomes: Sequence[Outcome], *, same_data: bool) -> tuple[str, ...]:
    """Return the texts of one line of the table. Mark the best values, unless all values are equal or cannot
    be compared. ``same_data``: whether the losses of the runs are comparable.
    """
    values = [each.value for each in outcomes if each.value is not None and math.isfinite(each.value)]
    better = outcomes[0].better
    if len(set(values)) < 2 or not better or (outcomes[0].of_data and not same_data):
        return tuple(each.text for each in outcomes)
    best = min(values) if better == "lower" else max(values)
    return tuple(each.text + _BETTER if each.value == best else each.text for each in outcomes)


def _cells(name: str, values: Sequence[str], width: int) -> list[tuple[str, ...]]:
    """Return the lines of one row, each as a tuple with a text for each run.

    Reasons for failures are wrapped. Any other text that is too long is shortened in the middle.
    """
    if name != "reason":
        return [tuple(truncate_middle(value, width) for value in values)]
    lines = _REASON_LINES if width >= _WIDE_COLUMN else _REASON_LINES - 1
    wrapped = [wrap(value, width, max_lines=lines, placeholder=" …") for value in values]
    return list(zip_longest(*wrapped, fillvalue=""))


class CompareScreen(WorkerDialog[None]):
    """A comparison of runs that fills the window. Escape closes it."""

    DEFAULT_CSS = """
    CompareScreen {
        #compare {
            width: 100%;
            height: 100%;
            background: $background;
            padding: 0 1;
        }
        #compare-table-side {
            height: auto;
            max-height: 50%;
        }
        #compare-table {
            height: auto;
        }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,v", "dismiss", "Close"),
        Binding("j", "scroll_table(1)", show=False),
        Binding("k", "scroll_table(-1)", show=False),
    ]

    def __init__(self, runs: Sequence[RunDir]) -> None:
        super().__init__()
        self._runs = runs
        self._compared: list[ComparedRun] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="compare", classes="frame") as dialog:
            dialog.border_title = f"{len(self._runs)} runs compared"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Drawing(partial(plot, no_plot("Reading the runs…")), classes="graph")
            with VerticalScroll(id="compare-table-side"):
                yield Static(id="compare-table")

    def on_mount(self) -> None:
        self._read()

    def on_resize(self) -> None:
        self._show_table()

    def action_scroll_table(self, lines: int) -> None:
        """Scroll the table down by this many lines, or up if ``lines`` is negative."""
        self.query_one("#compare-table-side").scroll_relative(y=lines, animate=False)

    @work(exclusive=True)
    async def _read(self) -> None:
        self._compared = [await asyncio.to_thread(read, run) for run in self._runs]
        self.query_one(Drawing).show(partial(plot, compare_plot(self._compared)))
        self._show_table()

    def _show_table(self) -> None:
        if self._compared:
            width = max(40, self.size.width - 6)
            self.query_one("#compare-table", Static).update(comparison_table(self._compared, width))
