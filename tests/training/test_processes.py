"""Two processes learn what one learns at the same effective batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qlora_tui.runs.directory import RunDir, create
from qlora_tui.runs.events import Evaluated, Finished
from tests.training.conftest import MakeRecipe, Trainers
from tests.training.told import events, losses, told

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("training")]


def run_with_two(run: RunDir) -> None:
    """As a user would: torchrun, two processes, gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.run(
        [*command, "-m", "qlora_tui.training", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr


def test_two_processes_give_the_losses_of_one(recipe: MakeRecipe, trainers: Trainers) -> None:
    # Three micro-batches a step: one process always has one fewer, and in the last step none.
    settings = {"training.gradient_accumulation": 3, "training.checkpoint_every": 2}
    alone, together = create(recipe(settings)), create(recipe(settings))
    assert trainers.run(alone) == 0
    run_with_two(together)
    assert isinstance(events(together)[-1], Finished)
    expected = losses(alone)
    assert losses(together) == pytest.approx(expected, abs=1e-5)
    assert [e.loss for e in told(together, Evaluated)] == pytest.approx(
        [e.loss for e in told(alone, Evaluated)], abs=1e-5
    )
    (newest, *_) = [folder for _, folder in reversed(together.checkpoints())]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in newest.iterdir()}
