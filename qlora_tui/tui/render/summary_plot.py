"""The loss graph of a run's summary, for previews: the decimated training loss, and the best validation."""

from __future__ import annotations

import math

from qlora_tui.runs.run_summary import RunSummary
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.render.axis import Axis, rounded, so_far
from qlora_tui.tui.render.plot import Curve, Mark, Plot, overall
from qlora_tui.tui.render.run_labels import best_words, no_steps_words
from qlora_tui.tui.render.series import Envelope


def summary_plot(summary: RunSummary | None) -> Plot:
    """Return the plot of a run; without steps it says whether there will be any."""
    if summary is None or not summary.losses:
        is_over = summary is not None and summary.status.state not in {*ACTIVE, "queued", "paused"}
        return Plot(Axis(0, 1), Axis(0, 1), empty=no_steps_words(is_over=is_over))
    broken = tuple(not math.isfinite(loss) for loss in summary.losses)
    loss = Envelope(
        tuple(map(float, summary.steps)),
        tuple(math.inf if bad else value for value, bad in zip(summary.losses, broken, strict=True)),
        tuple(-math.inf if bad else value for value, bad in zip(summary.losses, broken, strict=True)),
        broken,
    )
    marks: tuple[Mark, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    points = [loss]
    if summary.best is not None:
        best, step = summary.best
        marks = (Mark(step, best, "★", "$success bold"),)
        legend = ((best_words(summary), "$success bold"),)
        points.append(Envelope.of_points([float(step)], [best]))
    reach = overall(points)
    y = rounded(*reach, unit="loss") if reach else Axis(0.0, 1.0, "loss")
    return Plot(
        so_far(summary.step, summary.total_steps, "step"),
        y,
        (Curve(loss, "loss", "$primary"),),
        marks,
        legend,
    )
