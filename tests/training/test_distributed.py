"""Two processes learn what one learns at the same effective batch, choose alike, and end together."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.locks import is_locked
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs import actions
from qlora_tui.runs.control import send_request
from qlora_tui.runs.devices import CPU, is_free
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Evaluated, Failed, SampleGenerated, Started, ValidationCompared
from qlora_tui.runs.process import LAUNCHER_VARIABLE, process_identity, runner_lock_path
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.training import setup
from qlora_tui.training.control_requests import ControlRequests, StepAbandoned
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.loop import Loop, RunProgress
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.test_faults import inject_fault
from tests.training.test_preferences import write_pairs
from tests.training.test_resume import interrupted_at

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
    settings = {
        "training.checkpoint_every": 4,
        "training.gpus": 2,
        "lora.dropout": 0.1,
        "training.epochs": 50.0,
    }
    short = recipe({**settings, "training.max_steps": 20})
    resolve_model(short.model.id)  # Otherwise each process has it described by another that imports torch.
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


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_process_ends_whose_launcher_ended_before_it(is_alive: bool) -> None:
    code = "from qlora_tui.training.distributed import *; end_with_launcher(); print('goes on')"
    environ = os.environ | {
        "TORCHELASTIC_RUN_ID": "1",
        LAUNCHER_VARIABLE: str(os.getpid() if is_alive else 1),
    }
    process = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=False)
    assert (process.stdout == b"goes on\n", process.returncode == 0) == (is_alive, is_alive)


pytest.importorskip("torch")


def test_processes_wait_for_a_long_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[timedelta] = []
    monkeypatch.setattr("accelerate.PartialState", lambda cpu, timeout: waits.append(timeout))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    DistributedContext(world_size=2).initialize(on_cpu=True)
    assert waits[0] > timedelta(hours=1)


def test_a_model_is_not_the_last_owner_of_its_group(tmp_path: Path) -> None:
    # Else its destructor waits, with the GIL, for a thread of the group that may wait for the GIL.
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(distributed.group.WORLD)
    DistributedContext(world_size=2).disband()
    gc.collect()
    assert group() is not None and not distributed.is_initialized()


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


def play_loop(
    folder: RunDir, dist: DistributedContext, emitted: list[object]
) -> tuple[Loop, ControlRequests]:
    """Return a loop after its third step, without a model."""
    write_status(folder, Status(state="running", at=time.time(), process=process_identity()))
    reporter: Any = SimpleNamespace(emit=emitted.append, log=ignore, phase=ignore)
    loop: Any = object.__new__(Loop)
    requests = ControlRequests(folder, reporter, dist)
    recipe = Recipe(training=Training(sample_prompts=("One?", "Two?")))
    known: dict[str, Any] = {"recipe": recipe, "model": None, "tokenizer": None, "thinking": "auto"}
    loop._run = SimpleNamespace(
        **known, requests=requests, reporter=reporter, device=SimpleNamespace(torch_device=None)
    )
    loop.progress, loop.trainer = RunProgress(), SimpleNamespace(step=3)
    loop._evaluator = SimpleNamespace(has_validation_data=True)
    return loop, requests


def test_a_pause_at_once_of_several_processes_leaves_out_the_evaluation(recipe: MakeRecipe) -> None:
    run = create_run(recipe())
    dist: Any = SimpleNamespace(world_size=2, is_main_process=True, broadcast=lambda value: value)
    loop, requests = play_loop(run, dist, [])
    send_request(run, "pause_now")
    requests.raise_if_stop_now()
    requests.poll()
    with pytest.raises(StepAbandoned):
        loop._evaluate_and_sample(last=False)
    assert loop.progress.evaluation_due and loop.progress.evaluated_step == 3


def test_a_pause_at_once_waits_for_one_sample(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run, emitted = create_run(recipe()), list[object]()
    loop, _ = play_loop(run, DistributedContext(), emitted)

    def generate(
        model: object, tokenizer: object, prompts: tuple[str, ...], *_: object
    ) -> Iterator[tuple[str, str]]:
        for prompt in prompts:
            send_request(run, "pause_now")
            yield prompt, "Yes."

    monkeypatch.setattr("qlora_tui.training.loop.generate_samples", generate)
    loop._sample()
    assert [event.prompt for event in emitted if isinstance(event, SampleGenerated)] == ["One?"]
