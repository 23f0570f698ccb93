"""The graph of a run and the charts below it: one x axis, and what is left in a small window."""

from __future__ import annotations

from qlora_tui.tui.render.charts import Axis, Curve, Plot
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.screens.train.run_graph import LossGraph, StepChart

SPIKE = Envelope(
    tuple(float(step) for step in range(101)),
    tuple(9.0 if step == 60 else 1.0 for step in range(101)),
    tuple(9.0 if step == 60 else 1.0 for step in range(101)),
    (False,) * 101,
)


def drawn(width: int, height: int) -> list[str]:
    graph = LossGraph("No steps yet.")
    plot = Plot(Axis(0, 100, "step"), Axis(0, 10, "loss"), (Curve(SPIKE, "loss", ""),))
    graph.show(
        plot, (StepChart("lr", "1e-4", "10", SPIKE, 10.0), StepChart("tok/s", "12,345", "10", SPIKE, 10.0))
    )
    return [line.plain for line in graph.draw(width, height)]


def spike_at(line: str) -> int:
    """Column with the most dots of braille."""
    dots = [(ord(each) - 0x2800).bit_count() if 0x2800 <= ord(each) <= 0x28FF else 0 for each in line]
    return dots.index(max(dots))


def test_a_spike_has_one_column_in_graph_and_charts() -> None:
    lines = drawn(80, 24)
    assert len(lines) == 24
    peaks = [spike_at(line) for line in (lines[3], lines[-5], lines[-3])]
    assert peaks == [peaks[0]] * 3
