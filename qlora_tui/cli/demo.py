"""``demo``: the whole workflow on a small model."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time

from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.cli.terminal import write_control
from qlora_tui.demo.demo_run import DemoResult, run_demo
from qlora_tui.formatting import format_bytes, format_duration, format_float
from qlora_tui.runs.describe import describe
from qlora_tui.runs.events import AnyEvent, Step
from qlora_tui.runs.view import RunView

_INTERVAL_S = 10.0
"""Seconds between two progress lines when there is no terminal to rewrite one."""


class DemoProgress:
    """Progress of the run on stderr: one updating line on a terminal, occasional lines elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._printed_at = 0.0

    def show_status(self, text: str) -> None:
        """Print a status on its own line."""
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def on_event(self, event: AnyEvent, view: RunView) -> None:
        """Show an event of the run."""
        if not isinstance(event, Step):
            if line := describe(event, view.total_steps):
                self.show_status(f"  {line}")
            return
        left = "" if view.seconds_left is None else f"  {format_duration(view.seconds_left)} left"
        text = f"  {describe(event, view.total_steps)}{left}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            self._clear()
            print(text[: width - 1], end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._printed_at > _INTERVAL_S:
            self._printed_at = time.monotonic()
            self.show_status(text)

    def _clear(self) -> None:
        if self._is_terminal:
            write_control(sys.stderr, "\r\x1b[2K")


def run(args: argparse.Namespace) -> CommandResult:
    """Run the demo, showing progress on stderr."""
    progress = DemoProgress()
    result = run_demo(progress.show_status, progress.on_event)
    return CommandResult(data=result, text=_format_result(result))


def _format_result(result: DemoResult) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    column = (width - 3) // 2
    lines = [""]
    for sample in result.samples:
        if sample.base is None:
            continue
        lines.append(f"▸ {sample.prompt}" if sample.turn == 1 else f"  ▸ then: {sample.prompt}")
        left = textwrap.wrap(sample.base, column) or [""]
        right = textwrap.wrap(sample.adapter, column) or [""]
        lines.append(f"{'base':<{column}} │ adapter")
        for n in range(max(len(left), len(right))):
            a = left[n] if n < len(left) else ""
            b = right[n] if n < len(right) else ""
            lines.append(f"{a:<{column}} │ {b}".rstrip())
        lines.append("")
    lines += [
        f"voice            {result.in_voice} of {len(result.samples)} answers to questions that are not in "
        "the data are in the keeper's voice, end, and do not repeat",
        f"loss             {format_float(result.loss_first)} → {format_float(result.loss_last)} in "
        f"{result.steps} steps",
        f"validation loss  {format_float(result.validation_loss_before)} → "
        f"{format_float(result.validation_loss_after)}",
        f"peak memory      {format_bytes(result.measured_peak_bytes)} measured, "
        f"{format_bytes(result.estimated_peak_bytes)} estimated",
        f"speed            {result.tokens_per_s:,.0f} tokens/s; {format_duration(result.seconds)} in all",
        f"adapter          {result.adapter_dir}",
        "",
        f"Talk to it: qlora-tui chat {result.run}        Open the app: qlora-tui",
    ]
    return "\n".join(lines)


SUBCOMMANDS = {"demo": Subcommand(run, uses_gpu=True)}
