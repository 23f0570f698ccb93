"""Sweeps whose runs are played: each gets its events at once, as a trainer would write them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.recipe.fields import get_setting
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import append_event
from qlora_tui.runs.events import Evaluated, Failed, Finished, Paused, RunEnded, Started
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import read_status
from qlora_tui.sweeps import actions, driver
from qlora_tui.sweeps.directory import SweepDir
from qlora_tui.sweeps.driver import advance
from qlora_tui.sweeps.sheet import Sheet, Sweep
from qlora_tui.sweeps.space import Space
from qlora_tui.sweeps.view import SweepView, read_sweep
from tests.support.step_events import a_data_set, a_step

STEPS = 40
Loss = Callable[[Recipe, float], float]
"""Validation loss of a recipe after a share of its steps."""


@pytest.fixture(autouse=True)
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr(run_actions, "ensure_runner", lambda: None)
    monkeypatch.setattr(driver, "start_detached", lambda *job, **streams: None)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n')
    return Recipe(
        name="rates",
        model=Model(id="acme/tiny"),
        data=Data(sources=(Source(path=str(rows)),)),
        training=Training(lr_scheduler="wsd"),
    )


RATES: Space = {"training.learning_rate": [1e-4, 2e-4, 4e-4, 8e-4]}


def best_at(rate: float, noise: float = 0.001) -> Loss:
    """A loss that is lowest at a learning rate, falls with the steps, and differs between seeds."""

    def loss(recipe: Recipe, share: float) -> float:
        distance = abs(math.log(recipe.training.learning_rate / rate))
        return 2 - share + 0.1 * distance + noise * (recipe.training.seed % 3)

    return loss


def play(run: RunDir, loss: Loss, *, fails: bool = False) -> RunEnded:
    """Train a run of the queue to its next pause or its end."""
    done = read_status(run).step
    run_queue.take(run, process_identity())
    recipe, share = run.recipe(), run.pause_at or 1.0
    step = math.ceil(share * STEPS)
    now = time.time()
    append_event(run.events_path, Started(at=now, attempt=1, pid=1, resumed_from_step=done))
    append_event(run.events_path, a_data_set(steps_per_epoch=STEPS, total_steps=STEPS))
    for number in range(done + 1, step + 1):
        append_event(run.events_path, a_step(number, at=now))
    ending: RunEnded
    if fails:
        ending = Failed(title="Training diverged", what="The loss is NaN.", exit_code=1)
    else:
        reached = loss(recipe, share)
        append_event(run.events_path, Evaluated(step=step, loss=reached if math.isfinite(reached) else None))
        end = Finished(step=step, seconds=100.0, tokens_per_s=50.0, at=now + 110)
        ending = Paused(step=step) if run.pause_at else end
    append_event(run.events_path, ending)
    record_outcome(run, ending)
    return ending


def play_all(sweep: SweepDir, loss: Loss, most: int = 100) -> SweepView:
    """Train what the sweep queues, up to a number of runs or pauses."""
    for _ in range(most):
        waiting = run_queue.waiting()
        if not waiting:
            break
        play(RunDir(run_path(waiting[0])), loss)
        advance(sweep)
    return read_sweep(sweep)


def run_path(run_id: str) -> Path:
    from qlora_tui import paths

    return paths.runs_dir() / run_id


def sheet(recipe: Recipe, vary: Space = RATES, **settings: Any) -> Sheet:
    return Sheet(recipe=recipe, sweep=Sweep(vary=vary, **{"method": "grid", **settings}))


def rates(view: SweepView, outcome: str) -> list[float]:
    """Learning rates of the trials with an outcome."""
    trials = [trial for trial in view.trials if trial.role == "trial" and trial.outcome == outcome]
    return [get_setting(view.recipe_of(trial), "training.learning_rate") for trial in trials]
