"""The graph of a learning-rate range test: loss against the logarithm of the rate."""

from __future__ import annotations

import math

from qlora_tui.runs.lr_range import RangeSettings
from qlora_tui.runs.lr_suggestion import RangeCurve, format_rate
from qlora_tui.tui.render.axis import Axis, rounded
from qlora_tui.tui.render.plot import Curve, Mark, Plot
from qlora_tui.tui.render.series import Envelope

_ABOVE_START = 0.5
"""The graph shows losses up to this part of the fall above the first; higher ones are at its upper edge."""
_MIN_SHARE = 0.1
"""Least part of the first loss that counts as fall: noise of an untrained model is not enlarged."""


def lr_plot(curve: RangeCurve, settings: RangeSettings, recipe_rate: float, empty: str) -> Plot:
    """Return the graph of a curve, with its suggestion marked.

    Args:
        settings: the rates of the whole test, which may not have come so far yet.
        recipe_rate: the rate of the recipe, marked too where it is among them.
        empty: what to show before the first step.
    """
    x = Axis(math.log10(settings.low), math.log10(settings.high), "learning rate", is_log=True)
    if not curve.rates:
        return Plot(x, Axis(0, 1, "loss"), empty=empty)
    fall = max(curve.start - min(curve.smoothed), _MIN_SHARE * abs(curve.start))
    y = rounded(curve.start - fall, curve.start + _ABOVE_START * fall, unit="loss")
    places = [math.log10(rate) for rate in curve.rates]
    curves = (
        Curve(Envelope.of_points(places, curve.losses), "step", "$text-muted"),
        Curve(Envelope.of_points(places, curve.smoothed), "mean", "$primary"),
    )
    marks: list[Mark] = []
    legend = [("each step", "$text-muted"), ("mean", "$primary")]
    for symbol, name, rate, style in (
        ("○", "recipe", recipe_rate, "$secondary bold"),
        ("▼", "lowest", _lowest_rate(curve), "$accent bold"),
        ("◆", "suggested", curve.suggested, "$success bold"),
    ):
        if rate is None or not curve.rates[0] <= rate <= curve.rates[-1]:
            continue
        marks.append(Mark(math.log10(rate), _loss_at(curve, rate), symbol, style))
        legend.insert(0, (f"{symbol} {name} {format_rate(rate)}", style))
    return Plot(x, y, curves, tuple(marks), tuple(legend))


def _lowest_rate(curve: RangeCurve) -> float | None:
    """The rate of the lowest loss, once there is a suggestion: before, the curve may still fall."""
    return curve.rates[curve.lowest] if curve.lowest is not None and curve.suggested is not None else None


def _loss_at(curve: RangeCurve, rate: float) -> float:
    """The smoothed loss of the step whose rate is nearest."""
    nearest = min(range(len(curve.rates)), key=lambda i: abs(math.log(curve.rates[i] / rate)))
    return curve.smoothed[nearest]
