"""The panel of the machine that trains a run: its GPUs or, for a run without a GPU, its CPU and RAM.

Utilization is always drawn on a scale from 0 to 100 %, and memory on a scale up to the GPU's size, with a
tick at the estimate. A value that the GPU does not report is NA, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
from textual.content import Content

from qlora_tui.formatting import format_bytes, format_gib, format_percent, format_power, format_reading
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.telemetry import Reading
from qlora_tui.tui.render.meters import bar, history

_HOT_C, _HOTTEST_C = 83, 100
"""``_HOT_C``: lowest temperature, in °C, at which a GPU counts as hot. ``_HOTTEST_C``: temperature at the top
of the chart.
"""
_LABEL = 8
"""Width of the label before a chart, in cells."""
_MIN_CHART = 6
_CHARTS_ABOVE = 3
"""If a run has several GPUs, utilization and power are drawn as charts only if more lines than this are free
for each GPU.
"""
_SHORT_ROWS, _TALL_PANEL_ROWS = 2, 11
"""``_SHORT_ROWS``: maximum height of the panel, in rows, at which it shows only two lines.
``_TALL_PANEL_ROWS``: minimum height at which each chart has two rows.
"""


@dataclass(frozen=True)
class MachineState:
    """The data that the panel shows."""

    device: str = ""
    """Name of the GPU, such as ``RTX 4090``, or of the processor if the run uses no GPU; ``2 GPUs`` for a run
    on several GPUs.
    """
    readings: tuple[Reading, ...] = ()
    """Readings, newest last. The charts end at the newest reading."""
    gpu_names: Mapping[int, str] = field(default_factory=dict)
    """Names such as ``GPU 0 (RTX 4090)`` by GPU number; empty unless the run uses several GPUs."""
    estimate_bytes: int | None = None
    host_bytes: int | None = None
    """RAM of the machine in bytes, shown for a run without a GPU; None if unknown."""
    cores: int = 1
    is_over: bool = False
    """Whether the run has ended, so that ``readings`` are its last readings."""

    @property
    def has_no_gpu(self) -> bool:
        """Whether the run is known not to use a GPU."""
        return bool(self.readings) and self.readings[-1].gpu is None

    @property
    def title(self) -> str:
        """Title of the panel."""
        name = self.device or "Machine"
        if self.has_no_gpu:
            name += " · no GPU"
        return f"{name} · last readings" if self.is_over and self.readings else name


def machine_lines(machine: MachineState, width: int, height: int) -> list[Content]:
    """Return the lines of the panel. If there are several GPUs, divide the height equally among them.
    Otherwise, if the height is at most two, return two lines with the main meters; in a taller panel, each
    meter has its own lines.
    """
    if not machine.readings:
        return [Content.styled("No readings yet.", "dim")]
    if len(machine.readings[-1].gpus) > 1:
        return _lines_of_gpus(machine, width, height)
    meters = _meters(machine)
    if height <= _SHORT_ROWS:
        return _short_lines(machine, meters, width)
    return _lines(machine, meters, width, rows=2 if height >= _TALL_PANEL_ROWS else 1)[:height]


def _lines_of_gpus(machine: MachineState, width: int, height: int) -> list[Content]:
    """Return the lines of a run on several GPUs. Each GPU has a line with its name, followed by its meters.
    If there is little room, utilization and power are next to the name, and only the memory meter follows.
    """
    gpus = machine.readings[-1].gpus
    share = height // len(gpus)
    lines: list[Content] = []
    for gpu in gpus:
        name = machine.gpu_names.get(gpu.index, f"GPU {gpu.index}")
        readings = tuple(_of_gpu(each, gpu.index) for each in machine.readings)
        alone = replace(machine, readings=readings, estimate_bytes=None)
        meters = _meters(alone)
        has_charts = share > _CHARTS_ABOVE
        util, power = format_reading(gpu.utilization_percent), format_power(gpu.power_w)
        figures = "" if has_charts else f"  {util}  {power} W"
        lines.append(Content.assemble((name, "bold"), figures, "  ", _temperature(gpu)))
        # The GPU's name takes one of the GPU's lines.
        shown = meters[: share - 1] if has_charts else meters[: min(1, share - 1)]
        lines += _lines(alone, shown, width, rows=1) if shown else []
    return lines


def _of_gpu(reading: Reading, index: int) -> Reading:
    gpu = next((gpu for gpu in reading.gpus if gpu.index == index), None)
    return msgspec.structs.replace(reading, gpu=gpu, other_gpus=())


@dataclass(frozen=True)
class _Meter:
    """One quantity: its current value, and how to draw it."""

    name: str
    value: str | Content
    line: int | None = None
    """Index of the line for this meter if the panel has only two lines; None to leave the meter out."""
    history: tuple[float | None, ...] = ()
    """A value for each reading, to be drawn as a chart; empty for no chart."""
    top: float | None = None
    """Value at the top of the chart; None to use the highest value."""
    top_text: str = ""
    """``top`` as text, which is shown if the chart has two rows; empty if it is not known."""
    bar: tuple[int | None, int | None] | None = None
    """(used, total) in bytes, to be drawn as a bar with the estimate below it; None for no bar."""


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
            _Meter("memory", memory, 0, bar=(last.rss_bytes, machine.host_bytes)),
            _Meter("CPU", percent, 0, history, 100.0 * machine.cores, format_percent(machine.cores)),
        )
    memory = f"{format_gib(gpu.memory_used_bytes)} of {format_gib(gpu.memory_total_bytes)} GiB"
    powers = tuple(None if each is None else each.power_w for each in gpus)
    degrees = tuple(None if each is None else each.temperature_c for each in gpus)
    utilizations = tuple(None if each is None else each.utilization_percent for each in gpus)
    limit = "" if gpu.power_limit_w is None else f"{format_power(gpu.power_limit_w)} W"
    clock = "NA" if gpu.sm_clock_mhz is None else f"{gpu.sm_clock_mhz:,} MHz"
    return (
        _Meter("memory", memory, 0, bar=(gpu.memory_used_bytes, gpu.memory_total_bytes)),
        _Meter("util", format_reading(gpu.utilization_percent), 0, utilizations, 100.0, "100%"),
        _Meter("power", _power(gpu), 1, powers, gpu.power_limit_w, limit),
        _Meter("temp", _temperature(gpu), 1, degrees, _HOTTEST_C, f"{_HOTTEST_C} °C"),
        _Meter("clock", f"{clock}   fan {format_reading(gpu.fan_percent)}"),
        _Meter("slowed", _throttle(gpu), 1),
        _Meter("trainer", f"{format_bytes(last.rss_bytes)}, CPU {format_percent(last.cpu_percent / 100)}"),
    )


def _lines(machine: MachineState, meters: tuple[_Meter, ...], width: int, rows: int) -> list[Content]:
    """Return the lines of all meters. Each meter has a line with its name and its value. If the meter has a
    chart or a bar, it is to the left of the value. A chart has ``rows`` lines; if ``rows`` is 1, a bar is
    drawn instead of the chart.

    All charts and bars end in the same column, with the values next to them.
    """
    drawn = [Content.assemble(meter.value) for meter in meters if meter.history or meter.bar]
    cells = width - _LABEL - max(value.cell_length for value in drawn) - 1
    cells = cells if cells >= _MIN_CHART else 0
    lines: list[Content] = []
    for meter in meters:
        if meter.history:
            *above, last = (
                _meter_chart(meter, machine.readings, cells, rows)
                if rows > 1
                else [_filled(meter.history[-1], meter.top, cells)]
            )
        elif meter.bar:
            above, last = [], _filled(*meter.bar, cells)
        else:
            above, last = [], Content("")
        gap = " " if last.cell_length else ""
        for number, row in enumerate(above):
            top = f" {meter.top_text}" if number == 0 and row.cell_length else ""
            lines.append(Content.assemble(" " * _LABEL, row, (top, "dim")))
        lines.append(Content.assemble((f"{meter.name:<{_LABEL}}", "dim"), last, gap, meter.value))
        if meter.bar and meter.bar[1] and machine.estimate_bytes is not None:
            text = f"estimate {format_gib(machine.estimate_bytes)}"
            place = round(machine.estimate_bytes / meter.bar[1] * cells) - 1
            place = min(max(place, 0), max(0, cells - 1))
            # A tick at the right end needs no extra room: this text fits below the value, which is longer.
            tick = " " * place + f"▲ {text}" if cells else text
            lines.append(Content.assemble(" " * _LABEL, (tick, "dim")))
    return lines


def _short_lines(machine: MachineState, meters: tuple[_Meter, ...], width: int) -> list[Content]:
    """Return the most important meters in one or two lines, with a bar for memory."""
    cells = max(0, min(24, width - 60))
    lines: list[list[Content]] = [[], []]
    for meter in meters:
        if meter.line is None:
            continue
        gap = "  " if lines[meter.line] else ""
        part = Content.styled(f"{gap}{meter.name} ", "dim")
        if meter.bar and cells:
            part = Content.assemble(part, _filled(*meter.bar, cells), " ")
        part += meter.value
        if meter.bar and machine.estimate_bytes is not None:
            part += Content.styled(f"  estimate {format_gib(machine.estimate_bytes)}", "dim")
        lines[meter.line].append(part)
    return [Content("").join(parts) for parts in lines if parts]


def _filled(value: float | None, full: float | None, width: int) -> Content:
    """Return a bar that is filled to the fraction ``value / full``; empty if either value is unknown.

    The bar replaces a chart of one row, in which a constant value would look like a full bar.
    """
    return Content.styled(bar(value / full if value and full else 0.0, width), "$hardware")


def _meter_chart(meter: _Meter, readings: Sequence[Reading], width: int, rows: int) -> list[Content]:
    """Return a chart of ``rows`` lines with one column per second, the newest reading in the last column."""
    slots: list[float | None] = [None] * width
    end = readings[-1].at
    for value, reading in zip(meter.history, readings, strict=True):
        slot = width - 1 - math.floor(end - reading.at + 0.5)
        if 0 <= slot < width:
            slots[slot] = value
    for place in range(1, len(slots) - 1):
        # Fill a gap of a single second, since two readings may be slightly more than a second apart.
        if slots[place] is None and slots[place + 1] is not None:
            slots[place] = slots[place - 1]
    top = meter.top or max((each for each in slots if each), default=1.0)
    return history(slots, 0.0, top, rows, "$hardware")


def _power(gpu: GpuMetrics) -> str:
    limit = "" if gpu.power_limit_w is None else f" of {format_power(gpu.power_limit_w)}"
    return f"{format_power(gpu.power_w)}{limit} W"


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
