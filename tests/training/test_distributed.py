"""Two processes learn what one learns at the same effective batch, and choose alike at the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.runs import actions
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Evaluated, Finished
from qlora_tui.runs.status import ACTIVE, read_status
from qlora_tui.training import setup
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, losses

pytestmark = pytest.mark.slow


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with ``training.gpus = 2`` has two processes on the CPU."""
    monkeypatch.setenv("QLORA_TUI_CPU_PROCESSES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def finished(recipe: Recipe) -> RunDir:
    """Train a run by the queue."""
    run = actions.submit(recipe)
    wait_for(lambda: read_status(run).state not in ("queued", *ACTIVE), seconds=180)
    assert read_status(run).state == "finished", run.log_path.read_text()
    return run


@pytest.mark.usefixtures("quick_trainers", "two_processes")
def test_two_processes_give_the_losses_of_one(recipe: MakeRecipe, trainers: Trainers) -> None:
    # Three micro-batches a step: one process always has one fewer, and in the last step none.
    settings = {"training.gradient_accumulation": 3, "training.checkpoint_every": 2}
    alone = create_run(recipe(settings))
    assert trainers.run(alone) == 0
    together = finished(recipe({**settings, "training.gpus": 2}))
    assert isinstance(events(together)[-1], Finished)
    expected = losses(alone)
    assert losses(together) == pytest.approx(expected, abs=1e-5)
    assert [e.loss for e in events_of(together, Evaluated)] == pytest.approx(
        [e.loss for e in events_of(alone, Evaluated)], abs=1e-5
    )
    (newest, *_) = [folder for _, folder in reversed(together.checkpoints())]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in newest.iterdir()}


pytest.importorskip("torch")


def ignore(*_: object) -> None:
    """Of a reporter."""


def test_every_process_takes_what_the_first_chose_from_the_least_memory() -> None:
    asked: list[int] = []
    first = Recipe(training=Training(micro_batch_size=4, gradient_accumulation=2, optimizer="adamw"))

    def choose(recipe: Recipe, longest: int, free_bytes: int, **settings: Any) -> Recipe:
        asked.append(free_bytes)
        return recipe

    run: Any = SimpleNamespace(
        recipe=Recipe(),
        data=SimpleNamespace(train=SimpleNamespace(lengths=lambda: [5, 9])),
        meter=SimpleNamespace(free_bytes=lambda: 24, choose_step=choose, set_recipe=ignore),
        dist=SimpleNamespace(
            all_gather=lambda value: [value, 12], broadcast=lambda value: first, world_size=2
        ),
        reporter=SimpleNamespace(emit=ignore),
        has_run_out=False,
    )
    setup._choose_step(run)
    assert run.recipe.training == first.training
    assert asked == [12]
