"""Charts of a sweep: losses by the values of a varied setting, and losses over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from textual.content import Content

from qlora_tui.recipe.fields import setting_name
from qlora_tui.sweeps.describe import round_title, value_of
from qlora_tui.sweeps.plan import share_of
from qlora_tui.sweeps.space import Range, Values, value_text
from qlora_tui.sweeps.view import SweepView, Trial
from qlora_tui.tui.render.plot import Axis, Curve, Mark, Plot, loss_axis, overall, plot, ticks
from qlora_tui.tui.render.series import Envelope

_WINNER_STYLE, _UNCHANGED_STYLE, _LAST_STYLE, _EARLIER_STYLE = (
    "bold $validation",
    "bold $secondary",
    "$text",
    "$text-muted",
)
WINNER, UNCHANGED = ("★", _WINNER_STYLE), ("○", _UNCHANGED_STYLE)
"""(symbol, style) for losses of the winner and of the unchanged recipe."""
_OTHER = "•"
"""Symbol for the losses of all other trials, and for the individual runs behind a mean."""
_JOIN_STYLE = "$text-muted dim"
"""Style of the line that connects the losses of a round. Such a line is not a measurement, so it is faint."""
_FEW_ROWS = 11
"""Height of a chart, in lines, below which it shows only the last round that any trial has finished."""
_MARGIN = 0.03
"""Margin at each end of the axis for a range of values, as a fraction of the range."""
_TICKS = 8
"""Maximum number of ticks on a linear axis."""
_ROUND = (1, 2, 5)
_LONGEST_NAME = 12
"""Maximum length of the numbers at the end of a line, in characters."""
_LONGEST = 20
"""Maximum length of a value's label, in characters."""
_NAME_MARGIN = 0.1
"""Room for the numbers of trials to the right of their lines, as a fraction of the range of steps."""
_NOTHING = "No trial has been validated yet."


@dataclass(frozen=True)
class _Scale:
    """The axis for the values of a setting."""

    axis: Axis
    ticks: tuple[tuple[float, str], ...]
    """(position on the axis, label) pairs, in order."""
    values: Values
    """The values that the sweep varies."""

    def place(self, value: Any) -> float | None:
        """Return the position of a value on the axis; None if the value is not on the axis."""
        if isinstance(self.values, Range):
            return _of_range(self.values, value)
        text = value_text(value)
        return next((place for place, label in self.ticks if label == text), None)

    @property
    def has_order(self) -> bool:
        """Whether the values are numbers, which have an order."""
        return isinstance(self.values, Range) or all(map(_is_number, self.values))


def _scale(values: Values, more: Sequence[Any]) -> _Scale:
    """Return the axis for the values of a setting. The axis also includes the values in ``more``.

    For a range, the axis is linear or logarithmic. The values of a list are evenly spaced; if they are
    numbers, they are sorted.
    """
    if isinstance(values, Range):
        ends = [_of_range(values, value) for value in (values.low, values.high, *more)]
        places = [place for place in ends if place is not None]
        low, high = min(places), max(places)
        room = (high - low) * _MARGIN
        axis = Axis(low - room, high + room)
        return _Scale(axis, _log_ticks(axis) if values.log else tuple(ticks(axis, _TICKS)), values)
    listed = list(values)
    listed += [value for value in more if value_text(value) not in map(value_text, values)]
    if all(map(_is_number, listed)):
        listed.sort()
    labels = tuple((float(number), value_text(value)) for number, value in enumerate(listed))
    return _Scale(Axis(-0.5, len(listed) - 0.5), labels, values)


def _of_range(values: Range, value: Any) -> float | None:
    if not _is_number(value) or (values.log and value <= 0):
        return None
    return math.log10(value) if values.log else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _log_ticks(axis: Axis) -> tuple[tuple[float, str], ...]:
    powers = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    numbers = [float(f"{part}e{power}") for power in powers for part in _ROUND]
    inside = [number for number in numbers if axis.low <= math.log10(number) <= axis.high]
    if len(inside) < 2:
        inside = [float(f"{10**place:.2g}") for place in (axis.low, axis.high)]
    return tuple((math.log10(number), f"{number:g}") for number in inside)


def setting_lines(view: SweepView, path: str, width: int, height: int) -> list[Content]:
    """Return ``height`` lines with the plot of validation losses by the value of a setting."""
    return plot(setting_plot(view, path, only_last=height < _FEW_ROWS), width, height)


def setting_plot(view: SweepView, path: str, *, only_last: bool = False) -> Plot:
    """Return the plot of validation losses by the value of a setting. Each trial has a mark for the end of
    each of its rounds, and each run of the unchanged recipe has a mark. If the winner or the unchanged recipe
    was repeated with other seeds, its symbol is at the mean. If the values are numbers, a faint line for each
    round connects the lowest loss at each value. In a sweep with several rounds, the title of the round is
    next to this line.

    With ``only_last``, only the last round with results is drawn for the trials. If the values are a list,
    those that no trial in this round has are left out.
    """
    last_round = max((number for trial in view.trials for number in trial.results), default=0)
    values, bases = view.sheet.sweep.vary[path], view.base_trials[:1]
    if only_last and last_round > 1 and not isinstance(values, Range):
        # The other values would leave most of the axis empty.
        reached = {
            value_text(value_of(view, each, path)) for each in view.trials if last_round in each.results
        }
        values = [value for value in values if value_text(value) in reached]
    scale = _scale(values, [value_of(view, base, path) for base in bases])
    marks, lowest = [], dict[int, dict[float, float]]()
    winner, base = view.winner, bases[0] if bases else None
    for trial in view.trials:
        place = scale.place(value_of(view, trial, path))
        if place is None:
            continue
        for number, result in trial.results.items():
            if only_last and trial.role == "trial" and number < last_round:
                continue
            is_last = trial.role != "trial" or number == view.rounds
            symbol, style = _OTHER, _LAST_STYLE if is_last else _EARLIER_STYLE
            if trial.role == "base":
                symbol = UNCHANGED[0] if trial is base and view.mean_of(trial) is None else _OTHER
                style = _UNCHANGED_STYLE
            elif winner is not None and trial.values == winner.values and number == trial.rounds:
                symbol = WINNER[0] if trial is winner and view.mean_of(trial) is None else _OTHER
                style = _WINNER_STYLE
            marks.append(Mark(place, result.loss, style, symbol))
            if trial.role == "trial":
                of_round = lowest.setdefault(number, {})
                of_round[place] = min(result.loss, of_round.get(place, math.inf))
    for first, (symbol, style) in (winner, WINNER), (base, UNCHANGED):
        if first is None or (mean := view.mean_of(first)) is None:
            continue
        if (place := scale.place(value_of(view, first, path))) is not None:
            marks.append(Mark(place, mean, style, symbol))
    joins, titles = [], []
    for number, of_round in sorted(lowest.items()) if scale.has_order else ():
        envelope = Envelope.of_points(*zip(*sorted(of_round.items()), strict=True))
        joins.append(Curve(envelope, "", _JOIN_STYLE, look="thin"))
        if view.rounds > 1:
            style = _LAST_STYLE if number == view.rounds else _EARLIER_STYLE
            titles.append(Curve(envelope, "", style, label=round_title(view, number), look="points"))
    losses = [mark.y for mark in marks]
    title = round_title(view, view.rounds) if view.rounds > 1 else "other trials"
    # Titles at the losses name the rounds.
    others = {_LAST_STYLE: title, _EARLIER_STYLE: "earlier"}
    if titles:
        others = {} if winner is None else {_EARLIER_STYLE: "single runs"}
    by = f"by {setting_name(path)}{', last round' if only_last and last_round > 1 else ''}"
    return Plot(
        x=scale.axis,
        x_ticks=tuple((place, label[:_LONGEST]) for place, label in scale.ticks),
        y=loss_axis(min(losses), max(losses)) if losses else Axis(0.0, 1.0, "loss"),
        curves=(*joins, *titles),
        marks=_in_order(marks),
        has_all_marks=True,
        legend=((by, "dim"), *_legend(view, {mark.style for mark in marks}, others)),
        empty=_NOTHING,
    )


def _in_order(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Return the marks in drawing order: the most important marks are drawn last."""
    order = (_EARLIER_STYLE, _LAST_STYLE, _UNCHANGED_STYLE, _WINNER_STYLE)
    return tuple(sorted(marks, key=lambda mark: (order.index(mark.style), mark.symbol != _OTHER)))


def _legend(view: SweepView, drawn: set[str], others: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (text, style) items for the legend of marks with the styles ``drawn``. ``others``: words for
    marks of other trials, by style.
    """
    firsts = (view.winner, *view.base_trials[:1])
    has_mean = {first.role for first in firsts if first is not None and view.mean_of(first) is not None}
    # Until a trial has all of its steps, its losses are not those of the whole runs of the unchanged recipe.
    end = f" {round_title(view, view.rounds)}" if view.rounds > 1 and view.winner is None else ""
    winner, unchanged = (" (mean)" if role in has_mean else "" for role in ("trial", "base"))
    words = {
        _WINNER_STYLE: f"{WINNER[0]} trial {view.verdict.winner}{winner}",
        _UNCHANGED_STYLE: f"{UNCHANGED[0]} unchanged{unchanged}{end}",
        **{style: f"{_OTHER} {text}" for style, text in others.items()},
    }
    return tuple((text, style) for style, text in words.items() if style in drawn)


def steps_plot(view: SweepView) -> Plot:
    """Return the plot of validation losses over the percentage of steps, beginning at the first loss.

    Each trial with an evaluation has a line, with a mark for each evaluation, and its number next to the end
    of the line. Trials with equal losses share a line, with the numbers of all of them, or with the number of
    one trial, the winner if it is one of them, and the number of the others. The first run of the
    unchanged recipe is drawn like a trial, without a number. The line and the marks of the winner and the
    marks of the unchanged recipe are in color; everything else is muted. The last mark of the winner and of
    the unchanged recipe is a symbol. If one of these two was repeated with other seeds, its symbol is at the
    mean loss, as in :func:`setting_plot`.
    """
    base, lines = view.base_trials[:1], dict[tuple[str, tuple[tuple[float, float], ...]], list[Trial]]()
    for trial in sorted(view.trials, key=lambda trial: trial.number != view.verdict.winner):
        if trial.evaluations and (trial.role == "trial" or trial in base):
            points = tuple((100 * step / trial.total_steps, loss) for step, loss in trial.evaluations)
            lines.setdefault((trial.role, points), []).append(trial)
    curves, marks = [], []
    for (role, points), (first, *others) in lines.items():
        symbol, style = _OTHER, _EARLIER_STYLE
        if role == "base":
            symbol, style = UNCHANGED
        elif first.number == view.verdict.winner:
            symbol, style = WINNER
        numbers = sorted(trial.number for trial in (first, *others))
        name = ", ".join(map(str, numbers))
        if len(name) > _LONGEST_NAME:
            name = f"{first.number} and {len(others)} more"
        line_style = style if role == "trial" else _EARLIER_STYLE
        envelope = Envelope.of_points(*zip(*points, strict=True))
        curves.append(Curve(envelope, "", line_style, label=name if role == "trial" else "", look="thin"))
        marks += [Mark(share, loss, style, _OTHER) for share, loss in points]
        if symbol != _OTHER and (mean := view.mean_of(first)) is not None:
            marks.append(Mark(points[-1][0], mean, style, symbol))
        else:
            marks[-1] = replace(marks[-1], symbol=symbol)
    reach = overall([curve.envelope for curve in curves])
    ends = [100 * share_of(number, view.rounds) for number in range(1, view.rounds + 1)]
    begin = min((mark.x for mark in marks if mark.x < ends[-1]), default=0.0)
    return Plot(
        x=Axis(begin, ends[-1] + _NAME_MARGIN * (ends[-1] - begin)),
        x_ticks=tuple((end, f"{end:.3g}%") for end in ends),
        y=loss_axis(*reach) if reach else Axis(0.0, 1.0, "loss"),
        # The winner comes last, because later curves are drawn over earlier ones.
        curves=tuple(reversed(curves)),
        marks=_in_order(marks),
        has_all_marks=True,
        legend=(
            ("over the steps", "dim"),
            *_legend(view, {mark.style for mark in marks}, {_EARLIER_STYLE: "other trials"}),
        ),
        empty=_NOTHING,
    )
