"""Two processes learn what one learns at the same effective batch, choose alike, and end together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qlora_tui.locks import is_locked
from qlora_tui.recipe.schema import Recipe, Source, Training
from qlora_tui.runs import actions
from qlora_tui.runs.devices import CPU, is_free
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Evaluated, Failed, Started, ValidationCompared
from qlora_tui.runs.process import runner_lock_path
from qlora_tui.runs.status import read_status
from qlora_tui.training import setup
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.test_faults import inject_fault
from tests.training.test_preferences import write_pairs
from tests.training.test_resume import EVERY_STEP, interrupted_at

pytestmark = pytest.mark.slow


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with ``training.gpus = 2`` has two processes on the CPU."""
    monkeypatch.setenv("QLORA_TUI_CPU_PROCESSES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def finished(recipe: Recipe) -> RunDir:
    """Train a run by the queue."""
    run = actions.submit(recipe)
    # Its processes exit after that.
    wait_for(lambda: read_status(run).state == "finished" and is_free(CPU), seconds=180)
    return run


def as_alone(together: RunDir, alone: RunDir) -> None:
    """Assert that two processes have learned what one has."""
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    for ours, expected in zip(events_of(together, Evaluated), events_of(alone, Evaluated), strict=True):
        assert ours.loss == pytest.approx(expected.loss, abs=1e-5)
        assert ours.reward_margin == pytest.approx(expected.reward_margin, abs=1e-4)


@pytest.mark.usefixtures("quick_trainers", "two_processes")
@pytest.mark.parametrize("method", ["refuse", "dpo"])
def test_two_processes_give_the_losses_of_one(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three micro-batches a step: one process always has one fewer, and in the last step none.
    settings: dict[str, Any] = {"training.gradient_accumulation": 3, "training.checkpoint_every": 2}
    if method == "dpo":
        sources = (Source(path=str(write_pairs(tmp_path / "pairs.jsonl"))),)
        settings |= {"data.sources": sources, "data.preferences": method, "training.max_steps": 4}
    else:
        # Whatever process it happens in, all end, and the run goes on with less.
        settings |= {"training.micro_batch_size": 2, "training.auto_micro_batch": False}
        inject_fault(monkeypatch, "inject_oom_in_process('1', {3: 1})")
    alone = create_run(recipe(settings))
    assert trainers.run(alone) == 0
    together = finished(recipe({**settings, "training.gpus": 2}))
    as_alone(together, alone)
    assert [failed.kind for failed in events_of(together, Failed)] == ["out_of_memory"] * (method == "refuse")
    step, newest = together.checkpoints()[0]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in newest.iterdir()}
    compared = [events_of(run, ValidationCompared) for run in (together, alone)]
    assert len(compared[0]) == len(compared[1]) == (method == "refuse")
    assert trainers.run(interrupted_at(together, step)) == 1, "one process cannot go on as two"


@pytest.mark.usefixtures("quick_trainers", "two_processes")
def test_processes_end_with_torchrun_and_a_resume_repeats_the_losses(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**EVERY_STEP, "training.gpus": 2, "lora.dropout": 0.1, "training.epochs": 50.0}
    short = recipe({**settings, "training.max_steps": 30})
    with monkeypatch.context() as real:
        # Forked processes are no children of torchrun.
        real.setenv("FORK_SERVERS", "")
        run = actions.submit(short)
        wait_for(lambda: len(run.checkpoints()) > 1, seconds=180)
        process = read_status(run).process
        assert process is not None
        torchrun = psutil.Process(process.pid).parent()
        assert torchrun is not None and not is_free(CPU)
        ranks = torchrun.children()
        torchrun.kill()
        assert len(ranks) == 2 and psutil.wait_procs(ranks, timeout=20)[1] == []
        wait_for(lambda: read_status(run).state == "failed" and not is_locked(runner_lock_path()))
    assert events_of(run, Failed)[-1].kind == "killed" and is_free(CPU)
    actions.resume(run)
    wait_for(lambda: read_status(run).state == "finished", seconds=180)
    assert events_of(run, Started)[-1].resumed_from_step > 0
    assert losses(run) == pytest.approx(losses(finished(short)), abs=1e-7)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_the_model_is_refused(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "true")
    run = create_run(recipe())
    assert trainers.run(run) == 2
    (failed,) = events_of(run, Failed)
    assert "bitsandbytes issue 1945, accelerate issue 3983" in failed.why and "streamed_layers" in failed.fix


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
