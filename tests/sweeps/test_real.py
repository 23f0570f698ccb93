"""A sweep with real trainers, a real runner and the app, killed again and again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.runs.process import runner_lock_path
from qlora_tui.runs.status import read_status
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.sheet import Sheet, Sweep
from qlora_tui.sweeps.view import read_sweep
from tests.support.polling import wait_for
from tests.training.conftest import MakeRecipe, recipe, tiny_data, tiny_model

__all__ = ["recipe", "tiny_data", "tiny_model"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]


@pytest.fixture(autouse=True)
def no_runner() -> None:
    """This module has a real one."""


class DriverKiller(threading.Thread):
    """Kills the first processes that decide what is next in a sweep, soon after they start."""

    def __init__(self, most: int) -> None:
        super().__init__(daemon=True)
        self.killed: set[int] = set()
        self._most = most
        self._home = f"XDG_STATE_HOME={os.environ['XDG_STATE_HOME']}".encode()
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self._most and not self.over.wait(0.02):
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    is_driver = b"qlora_tui.sweeps.driver" in (folder / "cmdline").read_bytes()
                    if is_driver and self._home in (folder / "environ").read_bytes():
                        os.kill(int(folder.name), signal.SIGKILL)
                        self.killed.add(int(folder.name))


@contextmanager
def app_on_the_sweep(says: str) -> Iterator[Terminal]:
    """The app on a terminal, showing the sweep; killed at the end of the block."""
    with Terminal([sys.executable, "-m", "qlora_tui"], columns=120, rows=40) as terminal:
        terminal.wait_for("Train")
        terminal.press("6")
        terminal.wait_for("newest")
        terminal.press("W")
        terminal.wait_for(says)
        yield terminal


def runner_pid() -> int:
    return int(runner_lock_path().read_text() or 0)


def watched(terminal: Terminal, what: Callable[[], object], seconds: float) -> None:
    """Wait for a true value while the app goes on painting."""
    wait_for(lambda: (terminal.read(0.0), what())[1], seconds=seconds)


def test_a_sweep_survives_kills_of_app_runner_trainers_and_its_own_process(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    news = tmp_path / "news"
    command = f"echo $QLORA_TUI_TEXT >> {news}"
    (paths.config_dir() / "config.toml").write_text(f"[notify]\ncommand = {command!r}\n")
    settings: dict[str, Any] = {
        "name": "rates",
        "training.lr_scheduler": "wsd",
        "training.learning_rate": 1e-4,
        "data.validation_fraction": 0.2,
    }
    sweep_settings = Sweep(
        method="grid", rounds=2, seeds=2, vary={"training.learning_rate": [1e-6, 1e-5, 2e-3, 4e-3]}
    )
    killer = DriverKiller(2)
    killer.start()
    sweep = actions.start(Sheet(recipe=recipe(settings), sweep=sweep_settings))

    def training() -> list[Any]:
        statuses = [(t.run, read_status(t.run)) for t in read_sweep(sweep).trials if t.run]
        return [each for each in statuses if each[1].state == "running" and each[1].step]

    with app_on_the_sweep("Running") as app:
        watched(app, training, 120)
        os.kill(first := runner_pid(), signal.SIGKILL)
        watched(app, lambda: runner_pid() != first and training(), 120)
    os.kill(runner_pid(), signal.SIGKILL)
    with suppress(ProcessLookupError, IndexError):
        os.kill(training()[0][1].process.pid, signal.SIGKILL)
    wait_for(lambda: not training())
    # Only the app is there to start a runner.
    with app_on_the_sweep("Running") as app:
        watched(app, lambda: read_sweep(sweep).ended, 300)
        app.wait_for("Use learning rate")
    killer.over.set()
    view = read_sweep(sweep)
    assert view.state == "finished" and killer.killed
    assert [trial.outcome for trial in view.of_group(1)].count("dropped") == 2
    assert [trial.outcome for trial in view.of_group(1)].count("finished") == 2
    assert view.winner is not None and view.winner.values["training.learning_rate"] >= 2e-3
    assert view.verdict.basis == "confirmed" and view.verdict.noise
    assert not view.unequal_tokens()
    wait_for(news.exists)
    # Of the sweep, and of none of its runs.
    wait_for(lambda: news.read_text().startswith(f"The sweep {sweep.id} has ended. "))
    assert len(news.read_text().splitlines()) == 1
    assert len({trial.evaluations[0] for trial in view.trials}) == 1, "the same rows for every seed"
