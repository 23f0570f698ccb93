"""A full disk, out of memory, a restarted machine: each is reported, and the run continues or can resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.runs import actions, control, run_queue
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import (
    CheckpointSaved,
    DataReady,
    Failed,
    Finished,
    Health,
    PhaseChanged,
    Started,
    Step,
    StepVerified,
    Stopped,
)
from qlora_tui.runs.outcomes import determine_outcome
from qlora_tui.runs.status import read_status
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, last_step, losses

pytestmark = pytest.mark.slow

LONG = {"training.epochs": 60.0, "training.checkpoint_every": 1000, "training.eval_every": 1000}
WIDE = {"training.micro_batch_size": 4, "training.gradient_accumulation": 1, "training.checkpoint_every": 2}
"""Several rows at a time, and a checkpoint between two faults."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
@pytest.mark.parametrize("room", [65_536, 131_072], ids=["safetensors fails", "torch.save fails"])
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    run = create_run(recipe({"training.checkpoint_every": 2, "training.max_steps": 4}))
    inject_fault(monkeypatch, f"mount_small_tmpfs({str(run.checkpoints_dir)!r}, {room})")
    assert trainers.run(run) == 0
    assert isinstance(events(run)[-1], Finished)
    full = [health for health in events_of(run, Health) if health.kind == "disk_full"]
    assert full and not events_of(run, CheckpointSaved)
    phases = [event.phase for event in events_of(run, PhaseChanged)]
    assert phases[phases.index("saving") + 1] == "training"
    assert (run.adapter_dir / "adapter_model.safetensors").exists()


def test_a_machine_restarted_in_mid_run_is_told_as_that(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(recipe({**LONG, "training.max_steps": 20, "training.checkpoint_every": 2}))
    with monkeypatch.context() as before_the_restart:
        before_the_restart.setenv("QLORA_TUI_BOOT_ID", "before")
        trainer = trainers.start(run)
        wait_for(lambda: events_of(run, CheckpointSaved), seconds=60)
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    monkeypatch.setenv("QLORA_TUI_BOOT_ID", "after")
    assert "restarted" in read_status(run).detail
    ending = determine_outcome(run, None)
    assert isinstance(ending, Failed) and ending.kind == "lost"
    assert trainers.run(run) == 0
    assert events_of(run, Started)[-1].resumed_from_step > 0
    assert read_status(run).state == "finished"


@pytest.mark.usefixtures("quick_trainers")
def test_a_trainer_outlives_its_runner_and_starts_the_next_one(recipe: MakeRecipe) -> None:
    run = actions.submit(recipe(LONG))
    wait_for(lambda: last_step(run) >= 1, seconds=60)
    os.kill(int((paths.state_dir() / "runner.lock").read_text()), signal.SIGKILL)
    killed_at = last_step(run)
    waiting = create_run(recipe({"training.max_steps": 2}))
    run_queue.enqueue(waiting)
    wait_for(lambda: last_step(run) > killed_at + 2, seconds=60, saying="the trainer to go on")
    assert read_status(waiting).state == "queued"
    control.send_request(run, "finish_epoch")
    wait_for(lambda: read_status(waiting).state == "finished", seconds=120, saying="the next run")
    assert len(events_of(run, Started)) == 1 and read_status(run).state == "finished"
    ending = events(run)[-1]
    assert isinstance(ending, Finished) and list(losses(run)) == list(range(1, ending.step + 1))
    assert events_of(waiting, Started)[0].at > ending.at


def test_a_request_during_a_checkpoint_save_is_handled_after_it(
    recipe: MakeRecipe, trainers: Trainers
) -> None:
    run = create_run(recipe({**LONG, "training.checkpoint_every": 1}))
    trainer = trainers.start(run)
    wait_for(lambda: any(event.phase == "saving" for event in events_of(run, PhaseChanged)), seconds=60)
    actions.stop(run)
    control.send_request(run, "checkpoint")
    assert trainer.wait() == 0
    ending = events(run)[-1]
    assert isinstance(ending, Stopped)
    assert [event.step for event in events_of(run, CheckpointSaved)] == list(range(1, ending.step + 1))


def test_a_lack_of_memory_is_told_as_such(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(recipe({"data.max_length": 100000, "model.attention": "eager"}))
    _one_long_sample(run)
    inject_fault(monkeypatch, f"limit_address_space({1 << 30})")
    assert trainers.run(run) == 1
    ending = events(run)[-1]
    assert isinstance(ending, Failed) and ending.kind == "out_of_memory", run.log_path.read_text()
    assert "GiB" in ending.why and last_step(run) == 0
    assert "cheapest change that should be enough: Attention eager → auto" in ending.fix


@pytest.mark.usefixtures("quick_trainers")
def test_out_of_memory_during_training_resumes_smaller_from_the_checkpoint(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "inject_oom({4: 2, 6: 1, 8: 0.5})")
    run = actions.submit(recipe({**WIDE, "training.epochs": 6.0}))
    wait_for(lambda: read_status(run).state == "finished", seconds=120, saying="the end")
    attempts = events_of(run, Started)
    assert [(a.micro_batch_size, a.gradient_accumulation, a.gradient_checkpointing) for a in attempts] == [
        (4, 1, "off"),
        (2, 2, "off"),
        (1, 4, "off"),
        (1, 4, "on"),
    ]
    assert [a.resumed_from_step for a in attempts] == [0, 2, 4, 6]
    assert all(ending.kind == "out_of_memory" for ending in events_of(run, Failed))
    warnings = [health.remedy for health in events_of(run, Health) if health.kind == "out_of_memory"]
    assert len(warnings) == 3 and "micro-batch 1 × accumulation 4 and gradient checkpointing" in warnings[-1]
    data = events_of(run, DataReady)[0]
    assert list(losses(run)) == list(range(1, data.total_steps + 1))
    assert events_of(run, Step)[-1].tokens == 6 * data.tokens
    assert isinstance(events(run)[-1], Finished)


@pytest.mark.usefixtures("quick_trainers")
def test_a_run_that_cannot_fit_fails_with_the_cheapest_change(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "inject_oom({4: 0})")
    settings = {"training.micro_batch_size": 2, "training.gradient_checkpointing": "on"}
    costly = {"model.attention": "eager", "data.max_length": 8192}
    run = actions.submit(recipe({**WIDE, **settings, **costly}))
    wait_for(lambda: len(events_of(run, Failed)) == 2 and read_status(run).state == "failed", seconds=120)
    ending = events(run)[-1]
    assert isinstance(ending, Failed) and ending.kind == "out_of_memory"
    assert "The cheapest change that should be enough: Attention eager → auto saves" in ending.fix


@pytest.mark.usefixtures("quick_trainers")
def test_a_model_that_does_not_fit_is_loaded_only_once(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "no_memory_for_the_model()")
    run = actions.submit(recipe({**WIDE}))
    wait_for(lambda: read_status(run).state == "failed", seconds=120, saying="the end")
    ending = events(run)[-1]
    assert isinstance(ending, Failed) and (ending.kind, ending.phase) == ("out_of_memory", "loading")
    assert "smaller model" in ending.fix and len(events_of(run, Started)) == 1


@pytest.mark.parametrize(
    ("steps", "title", "last"),
    [(24, "The gradients overflow float16", 12), (3, "Training changed nothing", 3)],
)
def test_a_run_whose_steps_are_all_skipped_fails(
    recipe: MakeRecipe,
    trainers: Trainers,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    title: str,
    last: int,
) -> None:
    run = create_run(recipe({**LONG, "training.max_steps": steps, "training.checkpoint_every": 2}))
    inject_fault(monkeypatch, "overflow_every_step()")
    # The second attempt resumes, with no step that could change the adapter, or with the same fault.
    for _ in range(2):
        assert trainers.run(run) == 1
        ending = events(run)[-1]
        assert isinstance(ending, Failed) and (ending.title, ending.kind) == (title, "problem")
        assert not run.adapter_dir.exists()
    assert last_step(run) >= last


def inject_fault(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """What happens to trainers from now on, one of :mod:`tests.training.fault_injection`."""
    monkeypatch.setenv("BEFORE_TRAINER", f"from tests.training.fault_injection import *; {fault}")


def _one_long_sample(run: RunDir) -> None:
    """Data in which one answer is far longer than all others: the probe must meet it first."""
    source = Path(run.recipe().data.sources[0].path)
    long = source.with_name("long.jsonl")
    answer = "fox " * 12000
    long.write_text(
        source.read_text()
        + '{"messages": [{"role": "user", "content": "go on"}, '
        + f'{{"role": "assistant", "content": "{answer}"}}]}}\n'
    )
    run.recipe_path.write_text(run.recipe_path.read_text().replace(str(source), str(long)))


def test_a_check_that_cannot_run_does_not_end_the_run(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = recipe({"training.max_steps": 3})
    whole = create_run(short)
    assert trainers.run(whole) == 0
    for fault, reason in (
        ("no_reference_step()", "KeyError: 'rope_type'"),
        ("no_memory_for_the_reference_step(0)", "there was not enough memory"),
    ):
        run = create_run(short)
        inject_fault(monkeypatch, fault)
        assert trainers.run(run) == 0
        (event,) = events_of(run, StepVerified)
        assert event.reason == reason and not event.agrees and not event.replaced
        assert losses(run) == losses(whole)


@pytest.mark.parametrize(("setting", "code"), [("stop", 1), ("continue", 0)])
def test_a_step_that_differs_with_stock_code_stops_the_run(
    setting: str, code: int, recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(recipe({"training.max_steps": 1, "training.first_step_differs": setting}))
    inject_fault(monkeypatch, "even_stock_code_differs()")
    assert trainers.run(run) == code
    (event,) = events_of(run, StepVerified)
    assert not event.agrees
    ending = events(run)[-1]
    assert isinstance(ending, Failed if code else Finished)
    assert isinstance(ending, Finished) or "training.first_step_differs=continue" in ending.fix
    assert len(losses(run)) == (not code)


def test_a_check_short_of_memory_takes_fewer_tokens(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(recipe({"training.max_steps": 1}))
    inject_fault(monkeypatch, "no_memory_for_the_reference_step(30)")
    assert trainers.run(run) == 0
    (event,) = events_of(run, StepVerified)
    assert 0 < event.tokens <= 30 and event.agrees and not event.replaced
