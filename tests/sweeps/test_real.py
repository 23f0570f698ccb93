"""A sweep with real trainers and a real runner, killed again and again."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qlora_tui import paths
from qlora_tui.runs.process import ensure_runner, runner_lock_path
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


def test_a_sweep_survives_kills_of_runner_trainers_and_its_own_process(
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

    for kills_trainer in (False, True):
        wait_for(training, seconds=120)
        os.kill(int(runner_lock_path().read_text()), signal.SIGKILL)
        if kills_trainer:
            with suppress(ProcessLookupError, IndexError):
                os.kill(training()[0][1].process.pid, signal.SIGKILL)
            # As the app and `sweep show` do.
            wait_for(lambda: not training())
            ensure_runner()
    wait_for(lambda: read_sweep(sweep).ended, seconds=300)
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
