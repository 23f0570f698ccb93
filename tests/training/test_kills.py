"""kill -9 at random moments: files stay readable, and resume reaches the end."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial

import pytest

from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import CheckpointSaved, Failed, Finished, Phase, PhaseChanged, Started
from qlora_tui.runs.outcomes import determine_outcome, record_outcome
from qlora_tui.runs.status import read_status
from qlora_tui.training import checkpoints
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, losses

pytestmark = pytest.mark.slow

AIMS: tuple[Phase, ...] = ("training", "evaluating", "saving", "probing")
ROUNDS = 8


def test_random_kills_lose_nothing_before_the_last_checkpoint(recipe: MakeRecipe, trainers: Trainers) -> None:
    often = {"training.checkpoint_every": 1, "training.eval_every": 2, "training.lr_scheduler": "constant"}
    run, moments = (
        create_run(recipe({**often, "training.max_steps": 40, "training.epochs": 100.0})),
        random.Random(),
    )
    for round_ in range(1, ROUNDS + 1):
        trainer = trainers.start(run)
        wait_for(partial(_is_in, run, AIMS[round_ % len(AIMS)], trainer.pid), seconds=60)
        wait_a_moment(moments.uniform(0, 0.08))
        os.kill(trainer.pid, signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
        _is_told_and_readable(run, round_)
    # How often it saves may be changed; the rest of the way is of no interest.
    seldom = replace_setting(
        replace_setting(run.recipe(), "training.checkpoint_every", 99), "training.eval_every", 99
    )
    run.recipe_path.write_text(dump(seldom))
    assert trainers.run(run) == 0
    assert isinstance(events(run)[-1], Finished)
    assert list(losses(run)) == list(range(1, 41))


def _is_told_and_readable(run: RunDir, round_: int) -> None:
    assert read_status(run).state == "lost"
    tail = EventTail(run.events_path)
    assert list(tail.drain())
    assert tail.unknown == 0
    saved = events_of(run, CheckpointSaved)
    newest, damage = checkpoints.latest(run)
    assert damage == []
    assert not saved or (newest is not None and newest.step >= saved[-1].step)
    # As the runner does when its child has gone.
    ending = determine_outcome(run, -signal.SIGKILL)
    record_outcome(run, ending)
    assert isinstance(ending, Failed) and ending.kind == "killed"
    assert read_status(run).state == "failed"
    assert len(events_of(run, Started)) == round_


def _is_in(run: RunDir, phase: Phase, pid: int) -> bool:
    """Whether the trainer of this number is in a phase, or was and has gone on."""
    story = events(run)
    begun = next((n for n, e in enumerate(story) if isinstance(e, Started) and e.pid == pid), len(story))
    return any(isinstance(e, PhaseChanged) and e.phase == phase for e in story[begun:])


def wait_a_moment(seconds: float) -> None:
    """The one real sleep here: the moment of a kill is what is drawn by lot."""
    time.sleep(seconds)
