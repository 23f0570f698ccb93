"""The graph of a run: its loss, and below it small charts of its rate, gradients and speed, on one x axis.

An event in the graph is followed straight down to the charts. Each chart goes from zero to a round maximum:
scaled to its own range, a constant 98 % would look like 0 %. A value that is not a number is marked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from textual.content import Content

from qlora_tui.formatting import format_float
from qlora_tui.runs.describe import format_exact, format_rewards
from qlora_tui.tui.render.charts import (
    NOT_A_NUMBER,
    Axis,
    Curve,
    Mark,
    Plot,
    curve_rows,
    label,
    overall,
    plot,
    rounded,
    so_far,
    tick_step,
)
from qlora_tui.tui.render.labels import BEST, no_steps_words
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.screens.train.run_follower import RunSnapshot

_MIN_ROWS, _TALL_ROWS, _SPACED_ROWS = 9, 20, 30
"""Rows from which there are charts, from which they are two rows high, and from which they stand apart."""
_MIN_VALUE_CELLS = 7
"""Cells of a value such as ``1.27e-4``: the graph must not move with the number of digits."""
_STYLE = "$secondary"
VALIDATION = "◆"


@dataclass(frozen=True)
class StepChart:
    """One quantity over the steps."""

    name: str
    value: str
    """The last one, as text."""
    high: str
    """The highest value of the chart, as text."""
    envelope: Envelope
    top: float


def graph_lines(loss: Plot, charts: tuple[StepChart, ...], width: int, height: int) -> list[Content]:
    """Draw the loss and below it the charts; without room for them only their last values."""
    if loss.is_empty or not charts:
        return plot(loss, width, height)
    if height < _MIN_ROWS:
        return [*plot(loss, width, height - 1), _values(charts)]
    names = max(len(chart.name) for chart in charts)
    values = max(_MIN_VALUE_CELLS, *(len(chart.value) for chart in charts))
    gutter = names + values + 2
    rows = 2 if height >= _TALL_ROWS else 1
    gap = [Content.styled("│".rjust(gutter), "dim")] if height >= _SPACED_ROWS else []
    rows_below = (rows + len(gap)) * len(charts)
    lines = plot(replace(loss, gutter=gutter), width, height - rows_below)
    below = [
        line
        for chart in charts
        for line in gap + _chart_lines(chart, loss.x, names, gutter, width - gutter, rows)
    ]
    return [*lines[:-1], *below, lines[-1]]


def _chart_lines(
    chart: StepChart, x: Axis, names: int, gutter: int, columns: int, rows: int
) -> list[Content]:
    """The chart, with name and value before its last row and its highest value before the first of two."""
    curve = Curve(chart.envelope, chart.name, _STYLE)
    drawn = curve_rows(curve, x, Axis(0.0, chart.top), columns, rows)
    value = Content.assemble((f"{chart.name:<{names}} ", "dim"), f"{chart.value:>{gutter - names - 2}}")
    heads = [Content.styled(chart.high.rjust(gutter - 1), "dim")] * (rows - 1) + [value]
    edges = "┤" * (rows - 1) + "│"
    return [
        Content.assemble(head, (edge, "dim"), row)
        for head, edge, row in zip(heads, edges, drawn, strict=True)
    ]


def _values(charts: tuple[StepChart, ...]) -> Content:
    return Content("   ").join(Content.assemble((f"{chart.name} ", "dim"), chart.value) for chart in charts)


def loss_plot(snapshot: RunSnapshot, from_step: float) -> Plot:
    """Loss over steps: raw, its running mean, evaluations, and the best of them."""
    x = steps_axis(snapshot.step, snapshot.view.total_steps, from_step)
    envelopes = snapshot.envelopes
    shown = [e for e in snapshot.evaluations if e.loss is not None and e.step >= x.low]
    losses = [e.loss for e in shown if e.loss is not None and math.isfinite(e.loss)]
    points = Envelope.of_points([0.0] * len(losses), losses)
    reach = overall([envelopes.loss, envelopes.mean_loss, points])
    y = rounded(*reach, unit="loss") if reach else Axis(0.0, 1.0, "loss")
    marks = [
        Mark(e.step, e.loss, VALIDATION, "$accent")
        for e in shown
        if e.loss is not None and e is not snapshot.best
    ]
    if snapshot.best is not None and snapshot.best.loss is not None:
        marks.append(Mark(snapshot.best.step, snapshot.best.loss, BEST, "$success bold"))
    return Plot(
        x=x,
        y=y,
        curves=(
            Curve(envelopes.loss, "loss", "dim"),
            Curve(envelopes.mean_loss, "smoothed", "$primary bold"),
        ),
        marks=tuple(marks),
        legend=_legend(snapshot),
        empty=no_steps_words(is_over=snapshot.view.ending is not None),
    )


def steps_axis(step: int, total: int, from_step: float = 0.0) -> Axis:
    """The whole run so far, or its end from a step on."""
    whole = so_far(step, total, "step")
    if from_step <= 0:
        return whole
    grain = tick_step(0, max(1.0, step - from_step), 8)
    return Axis(from_step, max(math.ceil(step / grain) * grain, from_step + 1), "step")


def zoom_start(step: int, zoom: int) -> float:
    """Where a graph zoomed to the last half, quarter, eighth… of the steps begins: a round number."""
    if zoom <= 0 or step < 4:
        return 0.0
    part: float = step / 2**zoom
    grain = tick_step(0, part, 8)
    return max(0.0, math.floor((step - part) / grain) * grain)


def step_charts(snapshot: RunSnapshot) -> tuple[StepChart, ...]:
    """Each quantity over the steps from zero to a round maximum; those that only some runs have first."""
    envelopes, speed, rate = snapshot.envelopes, snapshot.tokens_per_s, snapshot.learning_rate
    lr = "NA" if rate is None else f"{rate:.2e}".replace("e-0", "e-") if rate else "0"
    points = {float(e.step): e.forgetting for e in snapshot.evaluations if e.forgetting is not None}
    forgetting = Envelope.of_points(tuple(points), tuple(points.values()))
    margin, recipe = snapshot.reward_margin, snapshot.recipe
    trains_preferences = recipe is not None and recipe.preference_method is not None
    return (
        *([_chart("margin", format_float(margin, 3), envelopes.reward_margin)] if trains_preferences else ()),
        *(
            [_chart("forget", format_float(forgetting.highs[-1], 3), forgetting)]
            if len(forgetting.xs) > 1
            else ()
        ),
        _chart("lr", lr, envelopes.learning_rate),
        _chart("grad", format_float(snapshot.grad_norm, 3), envelopes.grad_norm),
        _chart("tok/s", "NA" if speed is None else f"{speed:,.0f}", envelopes.tokens_per_s),
    )


def _chart(name: str, value: str, envelope: Envelope) -> StepChart:
    high = envelope.high
    top = rounded(0.0, high).high if high else 1.0
    return StepChart(name, value, label(top, top) if high else "", envelope, top)


def _legend(snapshot: RunSnapshot) -> tuple[tuple[str, str], ...]:
    if snapshot.loss is None:
        return ()
    items = [
        (f"{format_float(snapshot.loss, 3)}", "dim"),
        (f"━ smoothed {format_float(snapshot.mean_loss, 3)}", "$primary bold"),
    ]
    best, last = snapshot.best, snapshot.evaluations[-1] if snapshot.evaluations else None
    exact = format_exact(None if last is None else last.accuracy, snapshot.view.base_accuracy)
    # In a narrow window all fit only without the word.
    rewards = format_rewards(last)
    validation = "" if exact or rewards else "validation "
    if best is not None:
        if (before := snapshot.view.loss_to_beat) is None:
            items.append(
                (f"{BEST} best {validation}{format_float(best.loss, 3)} at {best.step:,}", "$success bold")
            )
        else:
            lowest = f"{BEST} lowest {format_float(best.loss, 3)} at {best.step:,}, "
            items.append((f"{lowest}{format_float(before, 3)} before training", "$warning bold"))
    if last is not None and last is not best:
        items.append((f"{VALIDATION} {validation}{format_float(_number(last.loss), 3)}", "$accent"))
    if exact:
        items.append((f"exact {exact}", "$accent"))
    if rewards:
        items.append((rewards, "$accent"))
    if any(snapshot.envelopes.loss.broken):
        items.append((f"{NOT_A_NUMBER} not a number", "$error bold"))
    if snapshot.step_stride > 1:
        items.append((f"showing 1 of {snapshot.step_stride:,} steps", "dim"))
    return tuple(items)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
