"""The loss graph of a run and, below it, charts of the learning rate, the gradient norm and the speed. All
have the same x axis.

A step has the same column in the graph and in all charts. Each chart goes from zero to a round maximum: if it
were scaled to the range of its values, a constant value would look like zero. Values that are not finite are
marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from textual.content import Content

from qlora_tui.formatting import (
    format_float,
    format_nats,
    format_rate,
    format_speed,
)
from qlora_tui.runs.describe import format_exact, format_rewards
from qlora_tui.runs.view import finite_losses
from qlora_tui.tui.render.labels import no_steps_words
from qlora_tui.tui.render.loss import (
    VALIDATION_STYLE,
    LossFacts,
    run_plot,
)
from qlora_tui.tui.render.meters import history
from qlora_tui.tui.render.plot import Axis, Plot, column_of, plot, rounded, so_far, tick_step
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.screens.train.run_follower import RunSnapshot

_MIN_ROWS, _TALL_ROWS = 12, 28
"""``_MIN_ROWS``: minimum height of the graph and its charts together, in rows, at which charts are drawn
below the graph. ``_TALL_ROWS``: minimum height at which each chart has two rows.
"""
_HEADROOM, _TOP_PARTS = 1.2, 10
"""``_HEADROOM``: minimum ratio of the top of a chart to the highest value, so that a constant value does not
fill the chart. ``_TOP_PARTS``: maximum number of round intervals between zero and the top.
"""
_MIN_VALUE_CELLS = 7
"""Minimum width of a chart's value, such as ``1.27e-4``, in cells, so that the graph does not move when the
number of digits changes.
"""


@dataclass(frozen=True)
class StepChart:
    """A small chart of one quantity over the training steps."""

    name: str
    value: str
    """The latest value as text."""
    envelope: Envelope
    top: float
    """Value at the top of the chart."""
    top_text: str = ""
    """``top`` as text, which is shown if the chart has two rows."""
    style: str = "$secondary"


def graph_lines(loss: Plot, charts: tuple[StepChart, ...], width: int, height: int) -> list[Content]:
    """Return the loss graph with the charts below it.

    If there is no room for the charts, only their latest values are shown.
    """
    if loss.is_empty or not charts:
        return plot(loss, width, height)
    if height < _MIN_ROWS:
        return [*plot(loss, width, height - 1), _values(charts)]
    names = max(len(chart.name) for chart in charts)
    values = max(_MIN_VALUE_CELLS, *(len(chart.value) for chart in charts))
    gutter = names + values + 2
    rows = 2 if height >= _TALL_ROWS else 1
    *upper, foot = plot(replace(loss, gutter=gutter), width, height - rows * len(charts))
    below = [
        line for chart in charts for line in _chart_lines(chart, loss.x, names, gutter, width - gutter, rows)
    ]
    return [*upper, *below, foot]


def _chart_lines(
    chart: StepChart, x: Axis, names: int, gutter: int, columns: int, rows: int
) -> list[Content]:
    """Return the chart as ``rows`` lines of blocks, with its name and value to the left of the last line. If
    there are several lines, the value at the top of the chart is to the left of the first line.

    Args:
        chart: The quantity to draw.
        x: The axis of steps.
        names: Width of the column with the charts' names, in cells.
        gutter: Width of everything to the left of the blocks, in cells.
        columns: Width of the blocks, in cells.
        rows: Height of the chart, in lines.
    """
    drawn = history(_by_column(chart.envelope, x, columns), 0.0, chart.top, rows, chart.style)
    head = Content.assemble((f"{chart.name:<{names}} ", "dim"), f"{chart.value:>{gutter - names - 2}} ")
    top = Content.styled(f"{chart.top_text:>{gutter - 1}} ", "dim")
    heads = [top, *[Content(" " * gutter)] * (rows - 2), head] if rows > 1 else [head]
    return [Content.assemble(head, row) for head, row in zip(heads, drawn, strict=True)]


def _by_column(envelope: Envelope, x: Axis, columns: int) -> list[float | None]:
    """Return a value for each column: the midpoint between the column's lowest and highest value or, if the
    column has no values, the value of the previous column. The value is NaN if the column has a value that is
    not finite, and None after the last step.
    """
    values: list[float | None] = [None] * columns
    for place, low, high, broken in zip(
        envelope.xs, envelope.lows, envelope.highs, envelope.broken, strict=True
    ):
        if x.low <= place <= x.high:
            values[column_of(place, x, columns)] = math.nan if broken or low > high else (low + high) / 2
    reached = max((number for number, value in enumerate(values) if value is not None), default=0)
    for number in range(1, reached):
        if values[number] is None:
            values[number] = values[number - 1]
    return values


def _values(charts: tuple[StepChart, ...]) -> Content:
    return Content("   ").join(Content.assemble((f"{chart.name} ", "dim"), chart.value) for chart in charts)


def loss_plot(snapshot: RunSnapshot, from_step: float) -> Plot:
    """Return the graph of a run's loss, beginning at step ``from_step``."""
    view, best = snapshot.view, snapshot.best
    last = snapshot.evaluations[-1] if snapshot.evaluations else None
    exact = format_exact(None if last is None else last.accuracy, view.base_accuracy)
    measured = (exact and f"exact {exact}", format_rewards(last))
    more = [(text, VALIDATION_STYLE) for text in measured if text]
    if snapshot.step_stride > 1:
        more.append((f"showing 1 in {snapshot.step_stride:,} steps", "dim"))
    return run_plot(
        LossFacts(
            x=so_far(snapshot.step, view.total_steps, "step", from_step),
            loss=snapshot.envelopes.loss,
            mean_loss=snapshot.envelopes.mean_loss,
            last_mean=snapshot.mean_loss,
            evaluations=finite_losses(snapshot.evaluations),
            best=None if best is None or best.loss is None else (best.step, best.loss),
            loss_to_beat=view.loss_to_beat,
            more=tuple(more),
            empty=no_steps_words(is_over=view.ending is not None),
        )
    )


def zoom_start(step: int, zoom: int) -> float:
    """Return the step at which graphs begin. If ``zoom`` is 0, return 0. Otherwise, return a round number, so
    that the graphs show about the last half (``zoom`` 1), quarter (2) or eighth (3) of the steps, and so on.
    """
    if zoom <= 0 or step < 4:
        return 0.0
    part: float = step / 2**zoom
    grain = tick_step(0, part, 8)
    return max(0.0, math.floor((step - part) / grain) * grain)


def step_charts(snapshot: RunSnapshot) -> tuple[StepChart, ...]:
    """Return the charts, each from zero to a round maximum. Charts that exist only for some runs are listed
    first.
    """
    envelopes = snapshot.envelopes
    points = {float(e.step): e.forgetting for e in snapshot.evaluations if e.forgetting is not None}
    forgetting = Envelope.of_points(tuple(points), tuple(points.values()))
    margin, recipe = snapshot.reward_margin, snapshot.recipe
    trains_preferences = recipe is not None and recipe.preference_method is not None
    return (
        *([_chart("margin", format_nats, margin, envelopes.reward_margin)] if trains_preferences else ()),
        *(
            [_chart("forgetting", format_nats, forgetting.highs[-1], forgetting, "$forgetting")]
            if len(forgetting.xs) > 1
            else ()
        ),
        _chart("lr", format_rate, snapshot.learning_rate, envelopes.learning_rate),
        _chart("grad", format_float, snapshot.grad_norm, envelopes.grad_norm),
        _chart("tok/s", format_speed, snapshot.tokens_per_s, envelopes.tokens_per_s, "$hardware"),
    )


def _chart(
    name: str,
    to_text: Callable[[float | None], str],
    value: float | None,
    envelope: Envelope,
    style: str = "$secondary",
) -> StepChart:
    high = envelope.high
    top = rounded(0.0, high * _HEADROOM, _TOP_PARTS).high if high and high > 0 else 1.0
    return StepChart(name, to_text(value), envelope, top, to_text(top) if high else "", style)
