"""Charts of a run: its loss, and below it its rate, gradients and speed on one x axis; and its machine.

An event in the graph is followed straight down to the charts. Each chart goes from zero to a round maximum:
scaled to its own range, a constant 98 % would look like 0 %. A value that is not a number is marked.
Utilization is drawn from 0 to 100 always; memory against the GPU's, with the estimate as a tick. What a GPU
does not report is NA, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from textual.content import Content

from qlora_tui.formatting import (
    format_bytes,
    format_float,
    format_gib,
    format_nats,
    format_percent,
    format_power,
    format_rate,
    format_speed,
)
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.describe import format_exact, format_rewards
from qlora_tui.runs.telemetry import Reading
from qlora_tui.runs.view import finite_losses
from qlora_tui.tui.render.charts import (
    Axis,
    Plot,
    bar,
    blocks,
    column_of,
    plot,
    rounded,
    so_far,
    tick_step,
)
from qlora_tui.tui.render.labels import no_steps_words
from qlora_tui.tui.render.loss import VALIDATION_STYLE, LossFacts, run_plot
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.screens.train.run_follower import RunSnapshot

_MIN_ROWS, _TALL_ROWS = 12, 28
"""Rows from which there are charts, and from which they are two rows high."""
_MIN_VALUE_CELLS = 7
"""Cells of a value such as ``1.27e-4``: the graph must not move with the number of digits."""


@dataclass(frozen=True)
class StepChart:
    """One quantity over the steps."""

    name: str
    value: str
    """The last one, as text."""
    envelope: Envelope
    top: float
    """The value at the top of the chart."""
    style: str = "$secondary"


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
    *upper, foot = plot(replace(loss, gutter=gutter), width, height - rows * len(charts))
    below = [
        line for chart in charts for line in _chart_lines(chart, loss.x, names, gutter, width - gutter, rows)
    ]
    return [*upper, *below, foot]


def _chart_lines(
    chart: StepChart, x: Axis, names: int, gutter: int, columns: int, rows: int
) -> list[Content]:
    """The chart in columns of blocks, with name and value before its last row."""
    # An eighth of a row stays free, so that charts do not run into each other.
    drawn = blocks(_by_column(chart.envelope, x, columns), 0.0, chart.top * (1 + 1 / (8 * rows - 1)), rows)
    head = Content.assemble((f"{chart.name:<{names}} ", "dim"), f"{chart.value:>{gutter - names - 2}} ")
    heads = [Content(" " * gutter)] * (rows - 1) + [head]
    return [
        Content.assemble(head, (row.rstrip(), chart.style)) for head, row in zip(heads, drawn, strict=True)
    ]


def _by_column(envelope: Envelope, x: Axis, columns: int) -> list[float | None]:
    """The value at each column: the middle of what falls in it, or the one before."""
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
    """The chart of a run's loss from a step on."""
    view, best = snapshot.view, snapshot.best
    last = snapshot.evaluations[-1] if snapshot.evaluations else None
    exact = format_exact(None if last is None else last.accuracy, view.base_accuracy)
    measured = (exact and f"exact {exact}", format_rewards(last))
    more = [(text, VALIDATION_STYLE) for text in measured if text]
    if snapshot.step_stride > 1:
        more.append((f"showing 1 of {snapshot.step_stride:,} steps", "dim"))
    return run_plot(
        LossFacts(
            x=steps_axis(snapshot.step, view.total_steps, from_step),
            loss=snapshot.envelopes.loss,
            mean_loss=snapshot.envelopes.mean_loss,
            last_loss=snapshot.loss,
            last_mean=snapshot.mean_loss,
            evaluations=finite_losses(snapshot.evaluations),
            best=None if best is None or best.loss is None else (best.step, best.loss),
            loss_to_beat=view.loss_to_beat,
            more=tuple(more),
            empty=no_steps_words(is_over=view.ending is not None),
        )
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
    envelopes = snapshot.envelopes
    points = {float(e.step): e.forgetting for e in snapshot.evaluations if e.forgetting is not None}
    forgetting = Envelope.of_points(tuple(points), tuple(points.values()))
    margin, recipe = snapshot.reward_margin, snapshot.recipe
    trains_preferences = recipe is not None and recipe.preference_method is not None
    return (
        *([_chart("margin", format_nats(margin), envelopes.reward_margin)] if trains_preferences else ()),
        *(
            [_chart("forget", format_nats(forgetting.highs[-1]), forgetting, "$forgetting")]
            if len(forgetting.xs) > 1
            else ()
        ),
        _chart("lr", format_rate(snapshot.learning_rate), envelopes.learning_rate),
        _chart("grad", format_float(snapshot.grad_norm), envelopes.grad_norm),
        _chart("tok/s", format_speed(snapshot.tokens_per_s), envelopes.tokens_per_s, "$hardware"),
    )


def _chart(name: str, value: str, envelope: Envelope, style: str = "$secondary") -> StepChart:
    high = envelope.high
    top = rounded(0.0, high).high if high else 1.0
    return StepChart(name, value, envelope, top, style)


_HOT_C = 83
_LABEL = 8
"""Cells of the name before a chart."""
_MIN_CHART = 6
_SHORT_ROWS, _TALL_PANEL_ROWS = 2, 11
"""Rows up to which there are two lines, and from which charts are two rows high."""


@dataclass(frozen=True)
class MachineState:
    """The data that the panel shows."""

    device: str = ""
    """``RTX 4090``, or the processor's name."""
    readings: tuple[Reading, ...] = ()
    """The newest last; charts end at it."""
    estimate_bytes: int | None = None
    host_bytes: int | None = None
    """RAM of the machine, which a run without a GPU uses."""
    cores: int = 1
    is_over: bool = False
    """Whether the run has ended, and these were its last readings."""

    @property
    def has_no_gpu(self) -> bool:
        """Whether the run is known to use none."""
        return bool(self.readings) and self.readings[-1].gpu is None

    @property
    def title(self) -> str:
        """Title of the panel."""
        name = self.device or "Machine"
        if self.has_no_gpu:
            name += " · no GPU"
        return f"{name} · last readings" if self.is_over and self.readings else name


def machine_lines(machine: MachineState, width: int, height: int) -> list[Content]:
    """Draw a line or two for each reading, or two lines in all."""
    if not machine.readings:
        return [Content.styled("No readings yet.", "dim")]
    meters = _meters(machine)
    if height <= _SHORT_ROWS:
        return _short_lines(machine, meters, width)
    return _lines(machine, meters, width, rows=2 if height >= _TALL_PANEL_ROWS else 1)


@dataclass(frozen=True)
class _Meter:
    """One quantity: its value now, and how it is drawn."""

    name: str
    value: str | Content
    line: int | None = None
    """Its line in a small window; None if it is left out there."""
    history: tuple[float | None, ...] = ()
    """A value for each reading, which makes it a chart."""
    top: float = 1.0
    """The value at the top of the chart."""
    bar: tuple[int | None, int | None] | None = None
    """Used and total bytes, which make it a bar with the estimate below it."""


def _meters(machine: MachineState) -> tuple[_Meter, ...]:
    readings = machine.readings
    last, gpus = readings[-1], [reading.gpu for reading in readings]
    gpu = last.gpu
    if gpu is None:
        total = "" if machine.host_bytes is None else f" of {format_gib(machine.host_bytes)}"
        memory = f"{format_gib(last.rss_bytes)}{total} GiB"
        percent = f"{format_percent(last.cpu_percent / 100)} of {machine.cores} cores"
        history = tuple(reading.cpu_percent for reading in readings)
        return (
            _Meter("CPU", percent, 0, history, 100.0 * machine.cores),
            _Meter("memory", memory, 0, bar=(last.rss_bytes, machine.host_bytes)),
        )
    memory = f"{format_gib(gpu.memory_used_bytes)} of {format_gib(gpu.memory_total_bytes)} GiB"
    powers = tuple(None if each is None else each.power_w for each in gpus)
    degrees = tuple(None if each is None else each.temperature_c for each in gpus)
    utilizations = tuple(None if each is None else each.utilization_percent for each in gpus)
    clock = "NA" if gpu.sm_clock_mhz is None else f"{gpu.sm_clock_mhz:,} MHz"
    return (
        _Meter("util", _percent(gpu.utilization_percent), 0, utilizations, 100.0),
        _Meter("memory", memory, 0, bar=(gpu.memory_used_bytes, gpu.memory_total_bytes)),
        _Meter("power", _power(gpu), 1, powers, gpu.power_limit_w or 1.0),
        _Meter("temp", _temperature(gpu), 1, degrees, 100.0),
        _Meter("clock", f"{clock}   fan {_percent(gpu.fan_percent)}"),
        _Meter("slowed", _throttle(gpu), 1),
        _Meter("trainer", f"{format_bytes(last.rss_bytes)}, CPU {format_percent(last.cpu_percent / 100)}"),
    )


def _lines(machine: MachineState, meters: tuple[_Meter, ...], width: int, rows: int) -> list[Content]:
    """A line or two for each meter; all charts end in the same column, with their values beside them."""
    drawn = [Content.assemble(meter.value) for meter in meters if meter.history or meter.bar]
    cells = width - _LABEL - max(value.cell_length for value in drawn) - 1
    cells = cells if cells >= _MIN_CHART else 0
    lines: list[Content] = []
    for meter in meters:
        if meter.history:
            *above, last = _meter_chart(meter, machine.readings, cells, rows)
        elif meter.bar:
            used, total = meter.bar
            above, last = [], Content.styled(bar(used / total if used and total else 0.0, cells), "$hardware")
        else:
            above, last = [], Content("")
        gap = " " if last.cell_length else ""
        lines += [Content(" " * _LABEL) + row for row in above]
        lines.append(Content.assemble((f"{meter.name:<{_LABEL}}", "dim"), last, gap, meter.value))
        if meter.bar and meter.bar[1] and machine.estimate_bytes is not None:
            text = f"estimate {format_gib(machine.estimate_bytes)}"
            place = round(machine.estimate_bytes / meter.bar[1] * cells) - 1
            place = min(max(place, 0), max(0, cells - 1))
            # A value beside the bar is longer than this text, so that it always fits.
            tick = " " * place + f"▲ {text}" if cells else text
            lines.append(Content.assemble(" " * _LABEL, (tick, "dim")))
    return lines


def _short_lines(machine: MachineState, meters: tuple[_Meter, ...], width: int) -> list[Content]:
    """The most important meters in a line or two, the first with a small chart."""
    cells = max(0, min(24, width - 60))
    lines: list[list[Content]] = [[], []]
    for number, meter in enumerate(meters):
        if meter.line is None:
            continue
        gap = "  " if lines[meter.line] else ""
        part = Content.assemble((f"{gap}{meter.name} ", "dim"), meter.value)
        if not number:
            part = Content.assemble(part, " ", _meter_chart(meter, machine.readings, cells, 1)[0])
        if meter.bar and machine.estimate_bytes is not None:
            part += Content.styled(f"  estimate {format_gib(machine.estimate_bytes)}", "dim")
        lines[meter.line].append(part)
    return [Content("").join(parts) for parts in lines if parts]


def _meter_chart(meter: _Meter, readings: Sequence[Reading], width: int, rows: int) -> list[Content]:
    """One column a second, the newest at the right end."""
    slots: list[float | None] = [None] * width
    end = readings[-1].at
    for value, reading in zip(meter.history, readings, strict=True):
        slot = width - 1 - math.floor(end - reading.at + 0.5)
        if 0 <= slot < width:
            slots[slot] = value
    for place in range(1, len(slots) - 1):
        # A single second that fell between two readings.
        if slots[place] is None and slots[place + 1] is not None:
            slots[place] = slots[place - 1]
    return [Content.styled(row, "$hardware") for row in blocks(slots, 0.0, meter.top, rows)]


def _percent(value: int | None) -> str:
    return "NA" if value is None else f"{value}%"


def _power(gpu: GpuMetrics) -> str:
    used = format_power(gpu.power_w)
    limit = format_power(gpu.power_limit_w)
    return f"{used} of {limit} W"


def _temperature(gpu: GpuMetrics) -> Content:
    if gpu.temperature_c is None:
        return Content("NA")
    hot = gpu.temperature_c >= _HOT_C
    return Content.styled(f"{gpu.temperature_c} °C{' hot' if hot else ''}", "$warning" if hot else "")


def _throttle(gpu: GpuMetrics) -> Content:
    if gpu.throttle is None:
        return Content("NA")
    if not gpu.throttle:
        return Content("no")
    return Content.styled("by " + ", ".join(gpu.throttle), "$warning")
