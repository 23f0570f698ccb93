"""The loss of a run as a picture: a graph of its summary, an SVG file, and a PNG file drawn by Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.formatting import format_float
from qlora_tui.installation import install_command
from qlora_tui.runs.run_summary import RunSummary
from qlora_tui.runs.status import ACTIVE
from qlora_tui.runs.view import RunView
from qlora_tui.tui.render.charts import (
    NOT_A_NUMBER,
    Axis,
    Curve,
    Mark,
    Plot,
    loss_axis,
    no_plot,
    overall,
    so_far,
    ticks,
)
from qlora_tui.tui.render.labels import BEST, no_steps_words
from qlora_tui.tui.render.series import BiasCorrectedEma, Envelope, smoothing_window

_WIDTH, _HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 50
_MIN_SAMPLES = 2.0
"""Least samples that the running mean of a summary looks back over."""
_MEAN_WEIGHT = 0.1
"""Weight of the newest step in the running mean."""
_GRAY, _BLUE, _GREEN, _AXIS = "#9a9a9a", "#2f7fb5", "#2e8b57", "#777777"
_SCALE = 2
"""Pixels per unit of the SVG."""
_SAMPLES = 2
"""Samples per pixel, each way, of which the picture is the mean."""
_BACKGROUND = "#ffffff"
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


VALIDATION = "◆"
"""The sign of an evaluation."""
TRAINING_STYLE, VALIDATION_STYLE, FILL = "$primary", "$success", "$chart-fill"


@dataclass(frozen=True, kw_only=True)
class LossFacts:
    """What the chart of a run's loss shows, on every screen."""

    x: Axis
    loss: Envelope
    """Of each step."""
    mean_loss: Envelope
    """Running mean of the loss."""
    last_loss: float | None
    last_mean: float | None
    evaluations: Sequence[tuple[int, float]]
    """(step, validation loss), in order; one that is no number is left out."""
    best: tuple[int, float] | None
    """The best evaluation after training began."""
    loss_to_beat: float | None = None
    """Validation loss before training where no later one is lower; None otherwise."""
    more: tuple[tuple[str, str], ...] = ()
    """Further (text, style) items of the legend."""
    empty: str = ""
    """What stands in place of a chart without steps."""


def run_plot(facts: LossFacts) -> Plot:
    """Return the chart of a run: running mean over a fill, raw losses as points, evaluations joined."""
    shown = [(step, loss) for step, loss in facts.evaluations if step >= facts.x.low]
    validation = Envelope.of_points([float(step) for step, _ in shown], [loss for _, loss in shown])
    reach = overall([facts.loss, facts.mean_loss, validation])
    y = loss_axis(*reach) if reach else Axis(0.0, 1.0, "loss")
    marks = [
        Mark(step, loss, VALIDATION, VALIDATION_STYLE) for step, loss in shown if (step, loss) != facts.best
    ]
    if facts.best is not None:
        marks.append(Mark(*facts.best, BEST, f"{VALIDATION_STYLE} bold"))
    return Plot(
        x=facts.x,
        y=y,
        curves=(
            Curve(facts.loss, "loss", "dim", look="points"),
            Curve(validation, "validation", VALIDATION_STYLE, look="thin"),
            Curve(facts.mean_loss, "smoothed", TRAINING_STYLE, fill=FILL),
        ),
        marks=tuple(marks),
        legend=_legend(facts, y),
        empty=facts.empty,
    )


def _legend(facts: LossFacts, y: Axis) -> tuple[tuple[str, str], ...]:
    """The newest values, with the decimals of the axis."""
    items: list[tuple[str, str]] = []
    if facts.last_loss is not None:
        items.append((f"· {y.text(facts.last_loss)}", "dim"))
    if facts.last_mean is not None:
        items.append((f"━ smoothed {y.text(facts.last_mean)}", f"{TRAINING_STYLE} bold"))
    last = facts.evaluations[-1] if facts.evaluations else None
    if last is not None and last != facts.best:
        items.append((f"{VALIDATION} validation {y.text(last[1])}", VALIDATION_STYLE))
    if facts.best is not None:
        step, loss = facts.best
        if (before := facts.loss_to_beat) is None:
            items.append((f"{BEST} best {y.text(loss)} at {step:,}", f"{VALIDATION_STYLE} bold"))
        else:
            lowest = f"{BEST} lowest {y.text(loss)} at {step:,}, {y.text(before)} before training"
            items.append((lowest, "$warning bold"))
    items += facts.more
    if any(facts.loss.broken):
        items.append((f"{NOT_A_NUMBER} not a number", "$error bold"))
    return tuple(items)


def summary_plot(summary: RunSummary | None) -> Plot:
    """Return the chart of a run as its summary knows it; without steps it says whether there will be any."""
    if summary is None or not summary.losses:
        is_over = summary is not None and summary.status.state not in {*ACTIVE, "queued", "paused"}
        return no_plot(no_steps_words(is_over=is_over))
    steps, losses = [float(step) for step in summary.steps], summary.losses
    # Of a long run, the summary has a sample of the steps.
    stride = max(1.0, steps[-1] / len(steps))
    smoother = BiasCorrectedEma(max(_MIN_SAMPLES, smoothing_window(summary.total_steps) / stride))
    means = smoother.smooth(losses)
    return run_plot(
        LossFacts(
            x=so_far(summary.step, summary.total_steps, "step"),
            loss=Envelope.of_points(steps, losses),
            mean_loss=Envelope.of_points(steps, means),
            last_loss=summary.loss,
            last_mean=means[-1],
            evaluations=summary.evaluations,
            best=None if summary.best is None else (summary.best[1], summary.best[0]),
            loss_to_beat=summary.loss_to_beat,
        )
    )


def loss_svg(view: RunView) -> str:
    """Return the picture of all recorded steps: losses, their running mean, and evaluations.

    Colors are readable on white and on black; the file has no script, no font and no link.
    """
    steps, losses = list(view.series.step), list(view.series.loss)
    mean = running_mean(losses)
    evaluations = [(e.step, e.loss) for e in view.evaluations if e.loss is not None]
    finite = [value for value in (*losses, *(loss for _, loss in evaluations)) if math.isfinite(value)]
    x = so_far(view.step, view.step, "step")
    y = loss_axis(min(finite), max(finite)) if finite else Axis(0.0, 1.0, "loss")
    best = view.best
    parts = [
        *_grid(x, y),
        *_line(x, y, steps, losses, _GRAY, 1.0),
        *_line(x, y, steps, mean, _BLUE, 2.5),
    ]
    for step, loss in evaluations:
        is_best = best is not None and (step, loss) == (best.step, best.loss)
        color, radius = (_GREEN, 6) if is_best else (_BLUE, 4)
        parts.append(f'<circle cx="{_x(x, step)}" cy="{_y(y, loss)}" r="{radius}" fill="{color}"/>')
    title = view.run.name
    if best is not None:
        title += f": best validation loss {format_float(best.loss, 3)} at step {best.step:,}"
    parts.append(_text(_LEFT, 28, title, size=18))
    legend = "gray: loss of each step   blue: running mean   dots: validation loss"
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, legend, anchor="end"))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, *parts, "</svg>", ""])


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the first values, then an exponential mean; one that is not a number does not change it."""
    means: list[float] = []
    mean, count = math.nan, 0
    for value in values:
        if math.isfinite(value):
            count += 1
            mean = value if count == 1 else mean + max(_MEAN_WEIGHT, 1 / count) * (value - mean)
        means.append(mean)
    return means


def _x(axis: Axis, step: float) -> str:
    return f"{_LEFT + (step - axis.low) / (axis.high - axis.low) * (_WIDTH - _LEFT - _RIGHT):.1f}"


def _y(axis: Axis, value: float) -> str:
    share = (value - axis.low) / (axis.high - axis.low)
    return f"{_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM):.1f}"


def _grid(x: Axis, y: Axis) -> list[str]:
    """Grid lines with their labels."""
    parts = []
    for value, label in ticks(y, 6):
        at = _y(y, value)
        ends = f'x1="{_LEFT}" y1="{at}" x2="{_WIDTH - _RIGHT}" y2="{at}"'
        parts.append(f'<line {ends} stroke="{_AXIS}" stroke-opacity="0.3"/>')
        parts.append(_text(_LEFT - 8, float(at) + 4, label, anchor="end"))
    for value, label in ticks(x, 8):
        parts.append(_text(float(_x(x, value)), _HEIGHT - _BOTTOM + 20, label, anchor="middle"))
    return parts


def _line(
    x: Axis, y: Axis, steps: Sequence[int], values: Sequence[float], color: str, width: float
) -> list[str]:
    """A line through the finite values, broken where one is not."""
    parts = []
    points = zip(steps, values, strict=True)
    for is_finite, stretch in groupby(points, key=lambda point: math.isfinite(point[1])):
        if is_finite:
            path = " ".join(f"{_x(x, step)},{_y(y, value)}" for step, value in stretch)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
    return parts


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{_AXIS}">{escape(text)}</text>'


def loss_png(svg: str) -> bytes:
    """Draw the picture of :func:`loss_svg` on white. Raises UserError where Pillow is not installed."""
    import io
    import xml.etree.ElementTree as ET

    try:
        from PIL import Image, ImageColor, ImageDraw, ImageFont
    except ImportError:
        raise UserError(
            "Pillow is not installed",
            what="PNG pictures are drawn by Pillow.",
            fix=f"Install it with `{install_command('pillow')}`, or save a picture as .svg.",
            exit_code=EXIT_USAGE,
        ) from None
    root = ET.fromstring(svg)
    unit = _SCALE * _SAMPLES
    size = [int(root.attrib[side]) for side in ("width", "height")]
    image = Image.new("RGB", (size[0] * unit, size[1] * unit), _BACKGROUND)
    draw = ImageDraw.Draw(image)

    def blended(color: str, opacity: float) -> tuple[int, ...]:
        pairs = zip(ImageColor.getrgb(color), ImageColor.getrgb(_BACKGROUND), strict=True)
        return tuple(round(own * opacity + behind * (1 - opacity)) for own, behind in pairs)

    def at(shape: dict[str, str], *names: str) -> list[float]:
        return [float(shape[name]) * unit for name in names]

    for element in root:
        shape: dict[str, Any] = element.attrib
        match element.tag.rpartition("}")[2]:
            case "line":
                color = blended(shape["stroke"], float(shape.get("stroke-opacity", 1)))
                draw.line(at(shape, "x1", "y1", "x2", "y2"), fill=color, width=unit)
            case "polyline":
                points = [float(number) * unit for number in shape["points"].replace(",", " ").split()]
                width = round(float(shape["stroke-width"]) * unit)
                draw.line(points, fill=shape["stroke"], width=width, joint="curve")
            case "circle":
                x, y, radius = at(shape, "cx", "cy", "r")
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape["fill"])
            case "text":
                font = ImageFont.load_default(float(shape["font-size"]) * unit)
                anchor = _ANCHORS[shape["text-anchor"]]
                draw.text(at(shape, "x", "y"), element.text or "", shape["fill"], font, anchor)
    small = image.resize((size[0] * _SCALE, size[1] * _SCALE), Image.Resampling.BOX)
    content = io.BytesIO()
    small.save(content, "PNG")
    return content.getvalue()
