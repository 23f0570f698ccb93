"""GPU metrics of a run, or CPU metrics without a GPU.

Utilization is drawn from 0 to 100 always; memory against the GPU's, with the estimate as a tick. What a GPU
does not report is NA, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from textual.content import Content

from qlora_tui.formatting import format_bytes, format_gib
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.telemetry import Reading
from qlora_tui.tui.render.charts import bar, blocks, labeled
from qlora_tui.tui.widgets.line_widgets import DiffWidget

_HOT_C = 83
_LABEL = 8
"""Cells of the name before a chart."""
_row = partial(labeled, cells=_LABEL)
_MIN_CHART = 6
_SHORT_ROWS, _TALL_ROWS = 2, 11
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
    def title(self) -> str:
        """Title of the panel."""
        name = self.device or "Machine"
        if self.readings and self.readings[-1].gpu is None:
            name += " · no GPU"
        return f"{name} · last readings" if self.is_over and self.readings else name


class GpuPanel(DiffWidget):
    """A line or two for each reading at the side of the graph, or two lines in all."""

    DEFAULT_CSS = """
    GpuPanel {
        height: 8;
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._machine = MachineState()

    def show(self, machine: MachineState) -> None:
        """Show new data; repaints only what changed."""
        if machine != self._machine:
            self._machine = machine
            self.set_class(bool(machine.readings) and machine.readings[-1].gpu is None, "-no-gpu")
            self.set_class(not machine.readings, "-empty")
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        machine = self._machine
        if not machine.readings:
            return [Content.styled("No readings yet.", "dim")]
        gpu = machine.readings[-1].gpu
        if height <= _SHORT_ROWS:
            return _gpu_short(machine, gpu, width) if gpu else _cpu_short(machine, width)
        rows = 2 if height >= _TALL_ROWS else 1
        return _gpu_lines(machine, gpu, width, rows) if gpu else _cpu_lines(machine, width, rows)


def _gpu_lines(machine: MachineState, gpu: GpuMetrics, width: int, rows: int) -> list[Content]:
    readings = machine.readings
    util, power, temperature = _percent(gpu.utilization_percent), _power(gpu), _temperature(gpu)
    memory = f"{format_gib(gpu.memory_used_bytes)} of {format_gib(gpu.memory_total_bytes)} GiB"
    chart = _chart_cells(width, util, memory, power, temperature.plain)
    powers = [None if s.gpu is None else s.gpu.power_w for s in readings]
    degrees = [None if s.gpu is None else s.gpu.temperature_c for s in readings]
    return [
        *_meter("util", _chart([_utilization(s) for s in readings], readings, chart, rows, 100.0), util),
        *_memory_lines(machine, gpu.memory_used_bytes, gpu.memory_total_bytes, memory, chart),
        *_meter("power", _chart(powers, readings, chart, rows, gpu.power_limit_w or 1.0), power),
        *_meter("temp", _chart(degrees, readings, chart, rows, 100.0), temperature),
        _row("clock", f"{_megahertz(gpu)}   fan {_percent(gpu.fan_percent)}"),
        _row("slowed", _throttle(gpu)),
        _row("trainer", f"{format_bytes(readings[-1].rss_bytes)}, CPU {readings[-1].cpu_percent:.0f}%"),
    ]


def _gpu_short(machine: MachineState, gpu: GpuMetrics, width: int) -> list[Content]:
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    chart = max(0, min(24, width - 60))
    drawn = _chart([_utilization(s) for s in machine.readings], machine.readings, chart, 1, 100.0)[0]
    tick = "" if machine.estimate_bytes is None else f"  estimate {format_gib(machine.estimate_bytes)}"
    first = Content.assemble(
        ("util ", "dim"),
        f"{_percent(gpu.utilization_percent)} ",
        drawn,
        ("  memory ", "dim"),
        f"{format_gib(used)} of {format_gib(total)} GiB",
        (tick, "dim"),
    )
    second = Content.assemble(
        ("power ", "dim"),
        _power(gpu),
        ("  temp ", "dim"),
        _temperature(gpu),
        ("  slowed ", "dim"),
        _throttle(gpu),
    )
    return [first, second]


def _cpu_lines(machine: MachineState, width: int, rows: int) -> list[Content]:
    reading = machine.readings[-1]
    used = f"{reading.cpu_percent:.0f}% of {machine.cores} cores"
    memory = _host_memory(machine, reading)
    chart = _chart_cells(width, used, memory)
    percents = [s.cpu_percent for s in machine.readings]
    return [
        *_meter("CPU", _chart(percents, machine.readings, chart, rows, 100.0 * machine.cores), used),
        *_memory_lines(machine, reading.rss_bytes, machine.host_bytes, memory, chart),
        Content.styled("No GPU in this run.", "dim"),
    ]


def _cpu_short(machine: MachineState, width: int) -> list[Content]:
    reading = machine.readings[-1]
    chart = max(0, min(24, width - 60))
    top = 100.0 * machine.cores
    drawn = _chart([s.cpu_percent for s in machine.readings], machine.readings, chart, 1, top)[0]
    tick = "" if machine.estimate_bytes is None else f"  estimate {format_gib(machine.estimate_bytes)}"
    return [
        Content.assemble(
            ("CPU ", "dim"),
            f"{reading.cpu_percent:.0f}% of {machine.cores} cores ",
            drawn,
            ("  memory ", "dim"),
            _host_memory(machine, reading),
            (tick, "dim"),
        )
    ]


def _host_memory(machine: MachineState, reading: Reading) -> str:
    total = "" if machine.host_bytes is None else f" of {format_gib(machine.host_bytes)}"
    return f"{format_gib(reading.rss_bytes)}{total} GiB"


def _chart_cells(width: int, *values: str) -> int:
    """Cells of the charts, so that all end in the same column and each has its value beside it."""
    cells = width - _LABEL - max(map(len, values)) - 1
    return cells if cells >= _MIN_CHART else 0


def _meter(name: str, chart: list[Content], value: str | Content) -> list[Content]:
    """Label, chart and value; of a chart of two rows, they are beside the lower one."""
    above = [Content(" " * _LABEL) + row for row in chart[:-1]]
    gap = " " if chart[-1].cell_length else ""
    return [*above, Content.assemble((f"{name:<{_LABEL}}", "dim"), chart[-1], gap, value)]


def _memory_lines(
    machine: MachineState, used: int | None, total: int | None, value: str, cells: int
) -> list[Content]:
    """A bar against all there is; below it, where the estimate is."""
    drawn = Content.styled(bar(used / total if used is not None and total else 0.0, cells), "$primary")
    lines = _meter("memory", [drawn], value)
    if machine.estimate_bytes is None or not total:
        return lines
    text = f"estimate {format_gib(machine.estimate_bytes)}"
    place = min(max(round(machine.estimate_bytes / total * cells) - 1, 0), max(0, cells - 1))
    # A value beside the bar is longer than this text, so that it always fits.
    tick = " " * place + f"▲ {text}" if cells else text
    return [*lines, Content.assemble(" " * _LABEL, (tick, "$accent"))]


def _chart(
    values: Sequence[float | None], readings: Sequence[Reading], width: int, rows: int, top: float
) -> list[Content]:
    """One column a second, the newest at the right end."""
    slots: list[float | None] = [None] * width
    if width and readings:
        end = readings[-1].at
        for value, reading in zip(values, readings, strict=True):
            slot = width - 1 - math.floor(end - reading.at + 0.5)
            if 0 <= slot < width:
                slots[slot] = value
        _fill_gaps(slots)
    return [Content.styled(row, "$secondary") for row in blocks(slots, 0.0, top, rows)]


def _fill_gaps(slots: list[float | None]) -> None:
    """Fill single seconds that fell between two readings."""
    for place in range(1, len(slots) - 1):
        if slots[place] is None and slots[place + 1] is not None:
            slots[place] = slots[place - 1]


def _utilization(reading: Reading) -> float | None:
    return None if reading.gpu is None else reading.gpu.utilization_percent


def _percent(value: int | None) -> str:
    return "NA" if value is None else f"{value}%"


def _power(gpu: GpuMetrics) -> str:
    used = "NA" if gpu.power_w is None else f"{gpu.power_w:.0f}"
    limit = "NA" if gpu.power_limit_w is None else f"{gpu.power_limit_w:.0f}"
    return f"{used} of {limit} W"


def _temperature(gpu: GpuMetrics) -> Content:
    if gpu.temperature_c is None:
        return Content("NA")
    hot = gpu.temperature_c >= _HOT_C
    return Content.styled(f"{gpu.temperature_c} °C{' hot' if hot else ''}", "$warning" if hot else "")


def _megahertz(gpu: GpuMetrics) -> str:
    return "NA" if gpu.sm_clock_mhz is None else f"{gpu.sm_clock_mhz:,} MHz"


def _throttle(gpu: GpuMetrics) -> Content:
    if gpu.throttle is None:
        return Content("NA")
    if not gpu.throttle:
        return Content("no")
    return Content.styled("by " + ", ".join(gpu.throttle), "$warning")
