"""Nothing dies when the terminal does: the app on a real pty, whose end is closed in mid-training."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import msgspec
import pytest

from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.workbench import Workbench
from tests.support.polling import wait_for

ROOT = Path(__file__).parents[2]
STEPS = 60


class Terminal:
    """A program on its own terminal, 100 × 30; ``hang_up`` closes it like a lost connection."""

    def __init__(self, command: list[str]) -> None:
        self._screen, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.program = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(side)
        self.painted = b""
        threading.Thread(target=self._read, daemon=True).start()

    def shows(self, text: str) -> bool:
        return text.encode() in self.painted

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def hang_up(self) -> None:
        screen, self._screen = self._screen, -1
        os.close(screen)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while self._screen >= 0:
                self.painted += os.read(self._screen, 65536)


def only_run() -> RunDir | None:
    runs = all_runs()
    return runs[0] if runs else None


@pytest.mark.slow
def test_a_run_survives_its_terminal_and_reports_every_step(tiny_recipe: Recipe) -> None:
    recipe = replace_setting(
        replace_setting(tiny_recipe, "training.max_steps", STEPS), "training.epochs", 1000.0
    )
    Draft().save(Workbench(recipe, preset="cpu-demo"), replace=True)
    terminal = Terminal([sys.executable, "-m", "qlora_tui"])
    wait_for(lambda: terminal.shows("Train"), seconds=60, saying="the first frame")
    terminal.press("5")
    wait_for(lambda: terminal.shows("Launch"), seconds=30, saying="the Train screen")
    terminal.press("t")
    run = wait_for(only_run, seconds=30, saying="a run")
    wait_for(lambda: read_status(run).step >= 3, seconds=120, saying="the third step")

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
