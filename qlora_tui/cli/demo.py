"""``demo``: the whole workflow on a small model."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

from qlora_tui.cli.subcommand import CommandResult, ProgressLine, Subcommand
from qlora_tui.demo.demo_run import DemoResult, run_demo
from qlora_tui.formatting import format_bytes, format_duration, format_loss, format_speed
from qlora_tui.runs.describe import describe
from qlora_tui.runs.events import AnyEvent, Progress, Step
from qlora_tui.runs.view import RunView


class DemoProgress:
    """Progress of the run on stderr."""

    def __init__(self) -> None:
        self._line = ProgressLine()

    def show_status(self, text: str) -> None:
        """Print a status on a line of its own."""
        self._line.clear()
        print(text, file=sys.stderr, flush=True)

    def show_progress(self, text: str) -> None:
        """Show the progress, in place of the previous text."""
        self._line.show(text)

    def on_event(self, event: AnyEvent, view: RunView) -> None:
        """Show the lines that describe an event of the run."""
        text = f"  {describe(event, view.total_steps)}"
        if isinstance(event, Step | Progress):
            left = "" if view.seconds_left is None else f"  {format_duration(view.seconds_left)} left"
            self._line.show(f"{text}{left}")
        elif text.strip():
            self.show_status(text)


def run(args: argparse.Namespace) -> CommandResult:
    """Run the demo, showing progress on stderr."""
    progress = DemoProgress()
    result = run_demo(progress.show_status, progress.show_progress, progress.on_event)
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
        f"voice            {result.in_voice} of {len(result.samples)} answers to questions outside the data "
        f"are in the keeper's voice, complete, and free of repetition",
        f"loss             {format_loss(result.loss_first)} → {format_loss(result.loss_last)} in "
        f"{result.steps} steps",
        f"validation loss  {format_loss(result.validation_loss_before)} → "
        f"{format_loss(result.validation_loss_after)}",
        f"peak memory      {format_bytes(result.measured_peak_bytes)} measured, "
        f"{format_bytes(result.estimated_peak_bytes)} estimated",
        f"speed            {format_speed(result.tokens_per_s)} tok/s",
        f"time             {format_duration(result.seconds)} in total",
        f"adapter          {result.adapter_dir}",
        "",
        f"Chat with it: qlora-tui chat {result.run}        Open the app: qlora-tui",
    ]
    return "\n".join(lines)


SUBCOMMANDS = {"demo": Subcommand(run, uses_gpu=True, for_programs=False)}
