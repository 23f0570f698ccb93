"""GPU metrics of a run, or CPU metrics without a GPU.

Utilization is drawn from 0 to 100 always; memory against the GPU's, with the estimate as a tick. What a GPU
does not report is NA, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content

from qlora_tui.formatting import format_bytes, format_gib
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.telemetry import Sample
from qlora_tui.tui.render.block_charts import bar, blocks
from qlora_tui.tui.widgets.diff_widget import DiffWidget

_HOT_C = 83


@dataclass(frozen=True)
class MachineState:
    """The data that the panel shows."""

    device: str = ""
    """``RTX 4090``, or the processor's name."""
    samples: tuple[Sample, ...] = ()
    """The newest last; charts end at it."""
    estimate_bytes: int | None = None
    host_bytes: int | None = None
    """RAM of the machine, which a run without a GPU uses."""
    cores: int = 1
    note: str = ""
    """Why there is nothing to see, or that it is the past."""


class GpuPanel(DiffWidget):
    """A box at the side of the graph, or two lines under it."""

    DEFAULT_CSS = """
    GpuPanel {
        height: 1fr;
    }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._machine = MachineState()

    def show(self, machine: MachineState) -> None:
        """Show new data; repaints only what changed."""
        if machine != self._machine:
            self._machine = machine
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        machine = self._machine
        if not machine.samples:
            return [Content.styled(machine.note or "No readings yet.", "dim")]
        sample = machine.samples[-1]
        if height <= 3:
            return (
                _gpu_short(machine, sample, sample.gpu, width) if sample.gpu else _cpu_short(machine, width)
            )
        lines = (
            _gpu_lines(machine, sample, sample.gpu, width, height)
            if sample.gpu
            else _cpu(machine, width, height)
        )
        if machine.note:
            lines.append(Content.styled(machine.note, "dim"))
        return lines


def _gpu_lines(
    machine: MachineState, sample: Sample, gpu: GpuMetrics, width: int, height: int
) -> list[Content]:
    chart_rows = 2 if height >= 16 else 1
    total, used = gpu.memory_total_bytes, gpu.memory_used_bytes
    lines = [
        Content.styled(machine.device, "bold"),
        _row("util", _percent(gpu.utilization_percent)),
        *_chart([_utilization(s) for s in machine.samples], machine.samples, width, chart_rows, 100.0),
        _row("memory", f"{format_gib(used)} of {format_gib(total)} GiB"),
    ]
    if used is not None and total:
        lines += _memory_bar(used, total, machine.estimate_bytes, width)
    lines.append(_row("power", _power(gpu)))
    if gpu.power_w is not None and gpu.power_limit_w:
        lines.append(Content.styled(bar(gpu.power_w / gpu.power_limit_w, width), "$secondary"))
    lines += [
        _row("temp", _temperature(gpu)),
        _row("clock", "NA" if gpu.sm_clock_mhz is None else f"{gpu.sm_clock_mhz:,} MHz"),
        _row("fan", _percent(gpu.fan_percent)),
        _row("slowed", _throttle(gpu)),
    ]
    if height >= len(lines) + 2:
        lines.append(_row("trainer", f"{format_bytes(sample.rss_bytes)}, CPU {sample.cpu_percent:.0f}%"))
    return lines


def _gpu_short(machine: MachineState, sample: Sample, gpu: GpuMetrics, width: int) -> list[Content]:
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    chart = max(0, min(24, width - 66))
    drawn = _chart([_utilization(s) for s in machine.samples], machine.samples, chart, 1, 100.0)[0]
    tick = "" if machine.estimate_bytes is None else f"  estimate {format_gib(machine.estimate_bytes)}"
    first = Content.assemble(
        (f"{machine.device}  ", "bold"),
        ("util ", "dim"),
        f"{_percent(gpu.utilization_percent)} ",
        drawn,
        ("  mem ", "dim"),
        f"{format_gib(used)}/{format_gib(total)} GiB",
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


def _cpu(machine: MachineState, width: int, height: int) -> list[Content]:
    sample = machine.samples[-1]
    top = 100.0 * machine.cores
    lines = [
        Content.styled(machine.device, "bold"),
        _row("CPU", f"{sample.cpu_percent:.0f}% of {machine.cores} cores"),
        *_chart(
            [s.cpu_percent for s in machine.samples], machine.samples, width, 2 if height >= 10 else 1, top
        ),
        _row("memory", _host_memory(machine, sample)),
    ]
    if machine.host_bytes:
        lines += _memory_bar(sample.rss_bytes, machine.host_bytes, machine.estimate_bytes, width)
    lines.append(Content.styled("No GPU in this run.", "dim"))
    return lines


def _cpu_short(machine: MachineState, width: int) -> list[Content]:
    sample = machine.samples[-1]
    chart = max(0, min(24, width - 66))
    top = 100.0 * machine.cores
    drawn = _chart([s.cpu_percent for s in machine.samples], machine.samples, chart, 1, top)[0]
    tick = "" if machine.estimate_bytes is None else f"  estimate {format_gib(machine.estimate_bytes)}"
    return [
        Content.assemble(
            ("no GPU  ", "bold"),
            ("CPU ", "dim"),
            f"{sample.cpu_percent:.0f}% of {machine.cores} cores ",
            drawn,
            ("  mem ", "dim"),
            _host_memory(machine, sample),
            (tick, "dim"),
        )
    ]


def _host_memory(machine: MachineState, sample: Sample) -> str:
    total = "" if machine.host_bytes is None else f" of {format_gib(machine.host_bytes)}"
    return f"{format_gib(sample.rss_bytes)}{total} GiB"


def _row(name: str, value: str | Content) -> Content:
    return Content.assemble((f"{name:<8}", "dim"), value)


def _memory_bar(used: int, total: int, estimate: int | None, width: int) -> list[Content]:
    lines = [Content.styled(bar(used / total, width), "$primary")]
    if estimate is not None:
        text = f"estimate {format_gib(estimate)}"
        place = min(max(round(estimate / total * width) - 1, 0), width - 1)
        # The label is on the side of the tick where it fits.
        if place + len(text) + 2 <= width:
            line = " " * place + "▲ " + text
        else:
            line = " " * max(0, place - len(text) - 1) + text + " ▲"
        lines.append(Content.styled(line, "$accent"))
    return lines


def _chart(
    values: Sequence[float | None], samples: Sequence[Sample], width: int, rows: int, top: float
) -> list[Content]:
    """One column a second, the newest at the right end."""
    slots: list[float | None] = [None] * width
    if width and samples:
        end = samples[-1].at
        for value, sample in zip(values, samples, strict=True):
            slot = width - 1 - math.floor(end - sample.at + 0.5)
            if 0 <= slot < width:
                slots[slot] = value
        _fill_gaps(slots)
    return [Content.styled(row, "$primary") for row in blocks(slots, 0.0, top, rows)]


def _fill_gaps(slots: list[float | None]) -> None:
    """Fill single seconds that fell between two samples."""
    for place in range(1, len(slots) - 1):
        if slots[place] is None and slots[place + 1] is not None:
            slots[place] = slots[place - 1]


def _utilization(sample: Sample) -> float | None:
    return None if sample.gpu is None else sample.gpu.utilization_percent


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


def _throttle(gpu: GpuMetrics) -> Content:
    if gpu.throttle is None:
        return Content("NA")
    if not gpu.throttle:
        return Content("no")
    return Content.styled("by " + ", ".join(gpu.throttle), "$warning")
