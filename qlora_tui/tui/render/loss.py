"""The loss of a run: the chart that all screens share, and the same chart as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from textual.content import Content

from qlora_tui.formatting import format_loss, format_loss_change, format_points
from qlora_tui.runs.result_weights import NOTABLE_RISE
from qlora_tui.runs.run_summary import RunSummary
from qlora_tui.runs.status import ACTIVE
from qlora_tui.runs.view import RunView, finite_losses
from qlora_tui.tui.render.labels import BEST, best_word, no_steps_words
from qlora_tui.tui.render.meters import bar, blocks
from qlora_tui.tui.render.picture import ON_ANY, Colors, area, circle, curve, document, star, straight, text
from qlora_tui.tui.render.plot import (
    Axis,
    Curve,
    Mark,
    Plot,
    loss_axis,
    no_plot,
    overall,
    plot,
    so_far,
    ticks,
)
from qlora_tui.tui.render.series import NOT_A_NUMBER, Envelope, smooth, smoothing_window

_WIDTH, _HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 50
_CHANGE_WIDTH = 8
"""Width of the bar for the change of a validation loss in a list of runs, in cells."""
RISE = "▲"
"""Beginning of the bar for a validation loss that rose."""
_LEAST_WITH_OTHERS = 2
"""If there are at most this many lines for evaluations, no line says how many evaluations are left out."""
_OUTLIER = 2
"""The bar of the first change of a validation loss is clipped if this change is more than this many times as
large as each of the others in the list.
"""
_MIN_SAMPLES = 2.0
"""Minimum window, in recorded losses, for smoothing the losses in a run's summary."""


SMOOTHED = "smoothed"
"""Name of the smoothed loss's curve."""
STEP_DOTS = "· step"
"""Legend item for the loss of each step."""
VALIDATION = "○"
"""Symbol of an evaluation in charts."""
TRAINING_STYLE, VALIDATION_STYLE, FILL = "$training", "$validation", "$chart-fill"
STEP_STYLE = "$text-muted dim"
"""Style of the dots for single steps, which are less visible than the smoothed curve."""


@dataclass(frozen=True, kw_only=True)
class LossFacts:
    """The contents of a run's loss chart."""

    x: Axis
    loss: Envelope
    """Loss of each step."""
    mean_loss: Envelope
    """Smoothed loss."""
    last_mean: float | None
    evaluations: Sequence[tuple[int, float]]
    """(step, validation loss) pairs in the order of steps, without values that are not finite."""
    best: tuple[int, float] | None
    """(step, validation loss) of the best evaluation after training began; None if there is none."""
    loss_to_beat: float | None = None
    """Validation loss before training, if no later validation loss is below it; otherwise None."""
    more: tuple[tuple[str, str], ...] = ()
    """Additional (text, style) items for the legend."""
    empty: str = ""
    """Text to show instead of a chart if the run has no steps."""


def run_plot(facts: LossFacts) -> Plot:
    """Return the chart of a run: the smoothed loss as a line, the loss of each step as a point, and the
    evaluations as marks joined by a dotted line. The area under the smoothed loss is filled if the axis
    begins at zero and the graph has many rows.

    The loss axis is scaled to the smoothed loss and the evaluations. Points outside the graph are left out.
    """
    shown = [(step, loss) for step, loss in facts.evaluations if step >= facts.x.low]
    validation = Envelope.of_points([float(step) for step, _ in shown], [loss for _, loss in shown])
    reach = overall([facts.mean_loss, validation]) or overall([facts.loss])
    y = loss_axis(*reach) if reach else Axis(0.0, 1.0, "loss")
    legend, notes = _legend(facts)
    style = f"{VALIDATION_STYLE} bold"
    marks = [Mark(step, loss, style, VALIDATION) for step, loss in shown if (step, loss) != facts.best]
    if facts.best is not None:
        marks.append(Mark(*facts.best, style, BEST))
    return Plot(
        x=facts.x,
        y=y,
        curves=(
            Curve(facts.loss, "loss", STEP_STYLE, look="points"),
            Curve(
                facts.mean_loss,
                SMOOTHED,
                TRAINING_STYLE,
                words=_from_to("train", facts.mean_loss, facts.last_mean),
                fill=FILL,
            ),
            Curve(
                validation,
                "validation",
                VALIDATION_STYLE,
                words=_from_to("val", validation, shown[-1][1] if shown else None),
                look="dotted",
            ),
        ),
        marks=tuple(marks),
        legend=legend,
        notes=notes,
        empty=facts.empty,
    )


def _from_to(name: str, losses: Envelope, last: float | None) -> str:
    """Return the first and the last loss of a curve, such as ``val 5.006 → 2.784``; empty without losses."""
    first = next((low for low in losses.lows if low < math.inf), None)
    if first is None or last is None:
        return ""
    return f"{name} {format_loss(first)} → {format_loss(last)}"


def _legend(facts: LossFacts) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Return two sequences of (text, style) items with the newest values: first, all items of the legend, the
    most important item first; second, only the items that are not about a curve.
    """
    items: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    if facts.last_mean is not None:
        items.append((f"━ smoothed {format_loss(facts.last_mean)}", f"{TRAINING_STYLE} bold"))
    if any(facts.loss.broken):
        notes.append((f"{NOT_A_NUMBER} not a number", "$error bold"))
    last = facts.evaluations[-1] if facts.evaluations else None
    if facts.best is not None:
        step, loss = facts.best
        text = f"{BEST} {best_word(facts.loss_to_beat)} {format_loss(loss)} at {step:,}"
        style = f"{VALIDATION_STYLE} bold"
        if facts.loss_to_beat is not None:
            text, style = f"{text}, {format_loss(facts.loss_to_beat)} before training", "$warning bold"
        notes.append((text, style))
    items += notes
    if last is not None:
        # If the last evaluation is the best, its loss is already in the legend.
        loss_text = "" if last == facts.best else f" {format_loss(last[1])}"
        items.append((f"{VALIDATION} validation{loss_text}", VALIDATION_STYLE))
    if facts.loss.xs:
        items.append((STEP_DOTS, "dim"))
    return (*items, *facts.more), (*notes, *facts.more)


def mean_losses(summary: RunSummary) -> Sequence[float]:
    """Return the smoothed losses in a run's summary.

    If the run is long, the summary has only a sample of its losses.
    """
    stride = max(1.0, summary.steps[-1] / len(summary.steps)) if summary.steps else 1.0
    window = smoothing_window(summary.total_steps) / stride
    return smooth(summary.losses, max(_MIN_SAMPLES, window))


def summary_plot(summary: RunSummary | None) -> Plot:
    """Return the chart of a run's summary. If there is no summary, or if the run has no steps, return a plot
    with only a text, which says whether steps will follow.
    """
    if summary is None or not summary.losses:
        is_over = summary is not None and summary.status.state not in {*ACTIVE, "queued", "paused"}
        return no_plot(no_steps_words(is_over=is_over))
    steps, means = [float(step) for step in summary.steps], mean_losses(summary)
    return run_plot(
        LossFacts(
            x=so_far(summary.step, summary.total_steps, "step"),
            loss=Envelope.of_points(steps, summary.losses),
            mean_loss=Envelope.of_points(steps, means),
            last_mean=means[-1],
            evaluations=summary.evaluations,
            best=None if summary.best is None else (summary.best[1], summary.best[0]),
            loss_to_beat=summary.loss_to_beat,
        )
    )


def summary_lines(summary: RunSummary | None, width: int, height: int) -> list[Content]:
    """Return ``height`` lines with the chart of a run's loss."""
    return plot(summary_plot(summary), width, height)


def changes_of_loss(summaries: Sequence[RunSummary]) -> dict[str, Content]:
    """Return, for the id of each run, the change from the first to the best validation loss in percent, with
    a bar: ``-53% ▄▄▄▄▖▁▁▁``. Runs with only one evaluation are left out.

    The largest fall has a full bar. If all bars would be more than half full, they would say no more than the
    numbers, and are left out.
    """
    changes = {
        summary.id: summary.best[0] / summary.evaluations[0][1] - 1
        for summary in summaries
        if len(summary.evaluations) > 1 and summary.best is not None and summary.evaluations[0][1] > 0
    }
    most = max((-change for change in changes.values() if change < 0), default=1.0)
    are_alike = all(-change > most / 2 for change in changes.values())
    return {
        id_: Content.assemble(
            f"{format_points(change):>3}%",
            (
                "" if are_alike else f" {bar(-change / most, _CHANGE_WIDTH)}",
                VALIDATION_STYLE if change < 0 else "$warning",
            ),
        )
        for id_, change in changes.items()
    }


def loss_svg(view: RunView) -> str:
    """Return a picture of a run as SVG: the losses of all recorded steps, their smoothed curve, and the
    evaluations.

    The colors are readable on both white and black.
    """
    frame = Frame(_LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
    title = view.run.name
    if view.best is not None:
        title += f": best validation loss {format_loss(view.best.loss)} at step {view.best.step:,}"
    legend = "gray: loss of each step   blue: smoothed   green: validation loss (★ best)"
    parts = [
        *loss_picture(view, frame, ON_ANY),
        text(_LEFT, 28, title, ON_ANY.labels, size=18),
        text(_WIDTH - _RIGHT, _HEIGHT - 8, legend, ON_ANY.labels, anchor="end"),
    ]
    return document(_WIDTH, _HEIGHT, parts)


@dataclass(frozen=True)
class Frame:
    """Position and size of a chart in a picture, not counting the chart's labels."""

    x: float
    y: float
    width: float
    height: float


def loss_picture(view: RunView, frame: Frame, colors: Colors, size: float = 13) -> list[str]:
    """Return the SVG shapes of a run's loss: a grid, labels in the font size ``size``, the losses, their
    smoothed curve, and the evaluations.
    """
    steps, losses = list(view.series.step), list(view.series.loss)
    means = smooth(losses, smoothing_window(len(losses)))
    evaluations = finite_losses(view.evaluations)
    finite = [value for value in (*losses, *(loss for _, loss in evaluations)) if math.isfinite(value)]
    x_axis = so_far(view.step, view.step, "step")
    y_axis = loss_axis(min(finite), max(finite)) if finite else Axis(0.0, 1.0, "loss")

    def x(step: float) -> float:
        return frame.x + (step - x_axis.low) / (x_axis.high - x_axis.low) * frame.width

    def y(loss: float) -> float:
        return frame.y + (y_axis.high - loss) / (y_axis.high - y_axis.low) * frame.height

    bottom = frame.y + frame.height
    parts = []
    mean = [(x(step), y(loss)) for step, loss in zip(steps, means, strict=True)]
    drawn = [point for point in mean if math.isfinite(point[1])]
    if colors.fill and drawn:
        parts.append(area([(drawn[0][0], bottom), *drawn, (drawn[-1][0], bottom)], colors.fill))
    for value, label in ticks(y_axis, 5):
        parts.append(
            straight(frame.x, y(value), frame.x + frame.width, y(value), colors.grid, colors.grid_opacity)
        )
        parts.append(text(frame.x - 8, y(value) + size / 3, label, colors.labels, size=size, anchor="end"))
    for value, label in ticks(x_axis, 8):
        parts.append(text(x(value), bottom + size + 7, label, colors.labels, size=size, anchor="middle"))
    raw = [(x(step), y(loss)) for step, loss in zip(steps, losses, strict=True)]
    points = [(x(step), y(loss)) for step, loss in evaluations]
    parts += [*curve(raw, colors.raw, 1.0), *curve(points, colors.validation, 1.5)]
    parts += curve(mean, colors.mean, 2.5)
    best = None if view.best is None else (view.best.step, view.best.loss)
    for point, at in zip(points, evaluations, strict=True):
        is_best = best == at
        parts.append((star if is_best else circle)(*point, 10 if is_best else 4, colors.validation))
    return parts


def lowest_losses(summaries: Sequence[RunSummary]) -> frozenset[str]:
    """Return the ids of the runs with the lowest validation loss. The set is empty for fewer than two
    validated runs, and if the losses are not comparable: a loss depends on the model, the data, and the
    length at which the data is cut.
    """
    losses = {row.id: row.best[0] for row in summaries if row.best is not None}
    kinds = {
        (row.model, row.data, *(each.value for each in row.settings if each.title == "length"))
        for row in summaries
        if row.id in losses
    }
    if len(losses) < 2 or len(kinds) > 1:
        return frozenset()
    lowest = min(losses.values())
    return frozenset(id_ for id_, loss in losses.items() if loss == lowest)


def shapes_of_loss(summaries: Sequence[RunSummary], cells: int) -> dict[str, str]:
    """Return a graph of the validation loss of each run, by the id of the run. Runs with fewer than two
    evaluations are left out.

    Each column stands for an equal part of the run's steps, and shows the last loss up to the end of this
    part. The graph of a run that has completed all of its steps has ``cells`` columns. In all graphs, the
    tallest column stands for the highest loss of all runs, and the shortest column for the lowest.
    """
    shown = [each for each in summaries if len(each.evaluations) > 1 and each.total_steps]
    losses = [loss for summary in shown for _, loss in summary.evaluations]
    shapes = {}
    for summary in shown:
        values: list[float | None] = []
        for column in range(max(1, math.ceil(cells * summary.step / summary.total_steps))):
            until = (column + 1) / cells * summary.total_steps
            before = (loss for step, loss in reversed(summary.evaluations) if step <= until)
            values.append(next(before, None))
        shapes[summary.id] = blocks(values, min(losses), max(losses), 1, is_apart=True)[0]
    return shapes


def _change_bar(part: float, width: int) -> str:
    """Return the bar of a change, at most ``width`` cells. ``part``: the change as a fraction of a full
    bar, negative for a fall. The bar of a change that exceeds a full bar is clipped.
    """
    drawn = bar(max(abs(part), 0.5 / max(1, width)), width, has_track=False).rstrip()
    return (RISE + drawn[1:])[:width] if part > 0 else drawn


def validation_lines(
    evaluations: Sequence[tuple[int, float, str]], best_step: int | None, width: int, height: int
) -> list[Content]:
    """Return a header line, and a line for each evaluation, newest first. A line has the step, the loss, and
    the change since the previous evaluation as a number and a bar, such as ``20 3.032 ★ -0.297 ▄▄▄``. If not
    all evaluations fit, the newest ones are shown. With at least three lines for evaluations, the last line
    then gives the number of the evaluations left out and the loss of the first one.

    A full bar stands for the largest change in the lines that are shown. If the first change of the run is
    more than :data:`_OUTLIER` times as large as each of the others, a full bar stands for the largest of the
    others, since their bars would otherwise all look alike, and the bar of the first change is clipped
    (``CLIPPED``). A full bar never stands for less than a notable rise, so that tiny changes have tiny bars.
    The bar of a rise begins with ``▲``, so that it can be distinguished from the bar of a fall even without
    color.

    Args:
        evaluations: (step, loss, further text) of each evaluation, oldest first. A loss may be NaN.
        best_step: Step of the best evaluation, which is marked; None if there is none.
        width: Width of the lines, in cells.
        height: Maximum number of lines. If it is 1 and there is an evaluation, the header line is left out.
    """
    losses = [round(loss, 3) for _, loss, _ in evaluations]
    changes = [math.nan, *(after - before for before, after in pairwise(losses))]
    has_titles = height > 1 or not evaluations
    rows = height - has_titles
    shown = list(range(len(evaluations)))
    if len(evaluations) > rows:
        shown = shown[-max(1, rows - (rows > _LEAST_WITH_OTHERS)) :]
    sizes = {number: abs(changes[number]) for number in shown if math.isfinite(changes[number])}
    initial, others = sizes.pop(1, 0.0), max(sizes.values(), default=0.0)
    level = max((abs(losses[number]) for number in shown if math.isfinite(losses[number])), default=0.0)
    is_outlier = others and initial > _OUTLIER * others
    most = max(NOTABLE_RISE * level, others if is_outlier else max(initial, others))
    lines = [Content.styled(f"{'step':>7}  {'loss':>5}    {'change':>7}", "dim")] if has_titles else []
    for number in reversed(shown):
        (step, loss, more), change = evaluations[number], changes[number]
        is_best = step == best_step
        line = Content.assemble(
            (f"{step:>7,}  ", "dim"),
            (f"{format_loss(loss):<6}", "bold" if is_best else ""),
            (f" {BEST}" if is_best else "  ", "$validation bold"),
        )
        style = "$warning" if change > NOTABLE_RISE * loss else "$validation" if change <= 0 else "dim"
        change_text = format_loss_change(change) if math.isfinite(change) else ""
        line += Content.assemble((f" {change_text:>7}", "dim" if change <= 0 else style), more)
        if change and math.isfinite(change):
            room = max(0, width - line.cell_length - 1)
            line += Content.styled(f" {_change_bar(change / most, room)}", style)
        lines.append(line)
    if len(shown) < len(evaluations) and rows > _LEAST_WITH_OTHERS:
        step, loss, _ = evaluations[0]
        others_text = f"  {len(evaluations) - len(shown):,} more, {format_loss(loss)} at step {step:,}"
        lines.append(Content.styled(others_text, "dim"))
    return lines
