"""Nothing dies when the terminal does: the app on a real pty, whose end is closed in mid-training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from bench.terminal import Terminal
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.workbench import Workbench
from tests.support.polling import wait_for

ROOT = Path(__file__).parents[2]
STEPS = 60
T = TypeVar("T")


def only_run() -> RunDir | None:
    runs = all_runs()
    return runs[0] if runs else None


def reading(terminal: Terminal, what: Callable[[], T | None]) -> T:
    """The first true value of ``what``; meanwhile the program can go on painting."""

    def read_and_look() -> T | None:
        terminal.read(0.0)
        return what()

    return wait_for(read_and_look, seconds=120)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
def test_a_run_survives_its_terminal_and_reports_every_step(tiny_recipe: Recipe) -> None:
    recipe = replace_setting(
        replace_setting(tiny_recipe, "training.max_steps", STEPS), "training.epochs", 1000.0
    )
    Draft().save(Workbench(recipe, preset="cpu-demo"), replace=True)
    command = [sys.executable, "-m", "qlora_tui"]
    with Terminal(command, columns=100, rows=30, controls=True) as terminal:
        terminal.wait_for("Train")
        terminal.press("5")
        terminal.wait_for("Launch")
        terminal.press("t")
        run = reading(terminal, only_run)
        reading(terminal, lambda: read_status(run).step >= 3)
        terminal.hang_up()
        terminal.program.wait(timeout=30)
    status = read_status(run)
    assert status.state == "running"
    assert status.step < STEPS

    attached = subprocess.run(
        [sys.executable, "-m", "qlora_tui", "attach", run.id, "--json"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=300,
    )
    events = [msgspec.json.decode(line) for line in attached.stdout.splitlines()]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert events[-1]["event"] == "finished"
    assert (run.adapter_dir / "adapter_model.safetensors").exists()
