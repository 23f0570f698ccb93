"""Killed with -9 at moments of nobody's choosing: files stay readable, and resume reaches the end."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial

import pytest

from qlora_tui.runs.directory import RunDir, create
from qlora_tui.runs.endings import how_it_ended, settle
from qlora_tui.runs.events import CheckpointSaved, DataReady, Failed, Finished, PhaseChanged, Started
from qlora_tui.runs.log import EventTail
from qlora_tui.runs.status import read_status
from qlora_tui.training import checkpoints
from tests.training.conftest import MakeRecipe, Trainers
from tests.training.told import events, last_step, losses, told
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("training")]

ROUNDS = 10


def test_ten_kills_at_random_moments_lose_nothing_beyond_the_last_checkpoint(
    recipe: MakeRecipe, trainers: Trainers
) -> None:
    settings = {
        "training.epochs": 20.0,
        "training.checkpoint_every": 3,
        "training.evaluate_every": 7,
        "training.schedule": "constant",
    }
    run, moments = create(recipe(settings)), random.Random(time.time_ns())
    for round_ in range(1, ROUNDS + 1):
        trainer = trainers.start(run)
        begun = last_step(run)
        # Some are killed on the way to the first step; most among steps, validations and checkpoints.
        if round_ % 5:
            wait_for(partial(_has_moved, run, begun), seconds=60)
        wait_a_moment(moments.uniform(0, 0.6))
        if _is_over(run):
            assert trainer.wait() == 0
            break
        os.kill(trainer.pid, signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
        _is_told_and_readable(run, round_)
    assert trainers.run(run) == 0
    assert isinstance(events(run)[-1], Finished)
    total = told(run, DataReady)[0].total_steps
    assert list(losses(run)) == list(range(1, total + 1))


@pytest.mark.parametrize("phase", ["probing", "evaluating", "saving"])
def test_a_kill_in_each_phase_is_survived(recipe: MakeRecipe, trainers: Trainers, phase: str) -> None:
    settings = {"training.epochs": 4.0, "training.checkpoint_every": 1, "training.evaluate_every": 2}
    run = create(recipe(settings))
    trainer = trainers.start(run)
    wait_for(lambda: any(event.phase == phase for event in told(run, PhaseChanged)), seconds=60)
    os.kill(trainer.pid, signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL
    _is_told_and_readable(run, 1)
    assert trainers.run(run) == 0
    assert read_status(run).state == "finished"


def _is_told_and_readable(run: RunDir, round_: int) -> None:
    assert read_status(run).state == "lost"
    tail = EventTail(run.events_path)
    tail.drain()
    assert tail.unknown == 0
    saved = told(run, CheckpointSaved)
    newest, damage = checkpoints.latest(run)
    assert damage == []
    assert not saved or (newest is not None and newest.step >= saved[-1].step)
    # As the runner does when its child has gone.
    ending = how_it_ended(run, -signal.SIGKILL)
    settle(run, ending)
    assert isinstance(ending, Failed) and ending.kind == "killed"
    assert read_status(run).state == "failed"
    assert len(told(run, Started)) == round_


def _has_moved(run: RunDir, step: int) -> bool:
    return last_step(run) != step or _is_over(run)


def _is_over(run: RunDir) -> bool:
    return isinstance(events(run)[-1], Finished)


def wait_a_moment(seconds: float) -> None:
    """The one real sleep here: the moment of a kill is what is drawn by lot."""
    time.sleep(seconds)
