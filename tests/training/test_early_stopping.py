"""A run that does not get better ends by itself, with the adapter of its best step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file

from qlora_tui.checksums import digest
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import DataReady, Evaluated, Finished
from qlora_tui.runs.status import read_status
from qlora_tui.training.adapter import load_best_weights
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of

pytestmark = pytest.mark.slow


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_stops_after_its_patience_and_keeps_the_best(recipe: MakeRecipe, trainers: Trainers) -> None:
    # At such a rate it only gets worse once it has begun to.
    settings = {"training.learning_rate": 0.1, "training.lr_scheduler": "constant", "training.epochs": 50.0}
    run = create_run(recipe({**settings, "training.eval_every": 1, "training.early_stopping": 3}))
    assert trainers.run(run) == 0
    ending = events(run)[-1]
    assert isinstance(ending, Finished)
    assert ending.checksums == digest(run.adapter_dir)
    best = [e.step for e in events_of(run, Evaluated) if e.best][-1]
    assert ending.step == best + 3 < events_of(run, DataReady)[0].total_steps
    assert "the validation loss did not improve in 3 evaluations" in ending.reason
    assert f"the adapter is from the best step, {best}" in ending.reason
    assert read_status(run).detail == ending.reason
    assert same_weights(run.adapter_dir, run.checkpoints_dir / f"step-{best}")
    assert not same_weights(run.adapter_dir, run.checkpoints_dir / f"step-{ending.step}")


def never_written(folder: Path) -> None:
    """As after a full disk."""


def half_deleted(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def cut_short(folder: Path) -> None:
    half_deleted(folder)
    (folder / "complete").write_text('{"adapter_model.safetensors": 2}')


@pytest.mark.parametrize("what", [never_written, half_deleted, cut_short])
def test_without_the_best_checkpoint_the_last_weights_stay(
    recipe: MakeRecipe, what: Callable[[Path], None]
) -> None:
    run: RunDir = create_run(recipe())
    what(run.checkpoints_dir / "step-4")
    # There is no model to put weights into: trying would fail.
    assert "from the last step, because the checkpoint of the best step, 4, is missing" in load_best_weights(
        run, None, 4
    )
