"""A run that was interrupted and resumed is the run that never was, to the last digit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.checksums import write_checksums
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import (
    CheckpointSaved,
    DataReady,
    Environment,
    Evaluated,
    Failed,
    Finished,
    Health,
    Paused,
    Phase,
    PhaseChanged,
    RequestReceived,
    Started,
    StepChosen,
    StepVerified,
    Stopped,
)
from qlora_tui.runs.memory_retry import RetryPlan
from qlora_tui.runs.outcomes import determine_outcome, record_outcome
from qlora_tui.runs.status import read_status
from qlora_tui.training import checkpoints
from tests.runs.test_check import flip
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, losses
from tests.training.test_faults import inject_fault

pytestmark = pytest.mark.slow

EXACT = 1e-6
EVERY_STEP: dict[str, Any] = {"training.checkpoint_every": 1, "training.keep_checkpoints": 100}
SHORT: dict[str, Any] = {**EVERY_STEP, "training.max_steps": 6}


def interrupted_at(run: RunDir, step: int, name: str = "interrupted") -> RunDir:
    """The run as it would be had its trainer been killed just after the checkpoint at ``step``."""
    copy = RunDir(run.path.with_name(f"{run.path.name}-{name}"))
    shutil.copytree(run.path, copy.path)
    shutil.rmtree(copy.adapter_dir)
    for at, folder in copy.checkpoints():
        if at > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize(
    ("optimizer", "places"), [("adamw", ("middle", "end")), ("paged_adamw_8bit", ("middle",))]
)
def test_resuming_repeats_the_same_losses(
    recipe: MakeRecipe, trainers: Trainers, optimizer: str, places: tuple[str, ...]
) -> None:
    """After a checkpoint in the middle of an epoch, and at its end."""
    # Rank 64 gives tensors of 4,096 elements, from which on 8-bit states are 8-bit; dropout draws numbers.
    settings = {"training.optimizer": optimizer, "lora.rank": 64, "lora.dropout": 0.1, **EVERY_STEP}
    whole = create_run(recipe(settings))
    assert trainers.run(whole) == 0
    expected = losses(whole)
    total = events_of(whole, DataReady)[0].total_steps
    for step in (total // 2 - (place == "middle") for place in places):
        again = interrupted_at(whole, step, f"at-{step}")
        assert trainers.run(again) == 0
        assert events_of(again, Started)[-1].resumed_from_step == step
        repeated = losses(again)
        assert list(repeated) == list(expected) == list(range(1, total + 1))
        assert all(abs(repeated[n] - expected[n]) < EXACT for n in expected)


def test_a_run_pauses_after_a_share_of_its_steps_with_a_validation(
    recipe: MakeRecipe, trainers: Trainers
) -> None:
    """It learns what it would have without the pauses; validation rows do not depend on the seed."""
    settings = {"training.max_steps": 8, "lora.dropout": 0.1, "data.validation_seed": 7}
    whole, run = create_run(recipe(settings)), create_run(recipe(settings), pause_at=0.25)
    other = create_run(recipe({**settings, "training.seed": 1}), pause_at=0.25)
    assert trainers.run(whole) == trainers.run(run) == trainers.run(other) == 0
    ending, evaluated = events(run)[-1], events_of(run, Evaluated)
    assert isinstance(ending, Paused) and ending.step == evaluated[-1].step == 2
    before, others = evaluated[0].loss, events_of(other, Evaluated)
    assert before == others[0].loss and evaluated[-1].loss != others[-1].loss
    # As if it had been killed before it recorded the pause.
    assert trainers.run(run) == 0 and events(run)[-1].step == 2  # type: ignore[union-attr]
    run.set_pause_at(0.5)
    assert trainers.run(run) == 0 and events_of(run, Evaluated)[-1].step == 4
    run.set_pause_at(None)
    assert trainers.run(run) == 0
    assert isinstance(events(run)[-1], Finished)
    assert losses(run) == pytest.approx(losses(whole), abs=EXACT)


def test_a_step_and_an_evaluation_given_up_are_repeated_exactly(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "lora.dropout": 0.1,
        "training.epochs": 4.0,
        "training.gradient_accumulation": 4,
        "training.log_every": 2,
        "training.eval_every": 2,
        "training.max_steps": 6,
    }
    whole = create_run(recipe(settings))
    assert trainers.run(whole) == 0
    run = create_run(recipe(settings))

    def asked(within: str, number: int, kind: str) -> Stopped | Paused:
        """Train until a request arrives in the middle of a step or an evaluation; return how that ended."""
        with monkeypatch.context() as attempt:
            request = f"request_within_{within}({str(run.path)!r}, {number}, {kind!r})"
            attempt.setenv("BEFORE_TRAINER", f"from tests.training.fault_injection import *; {request}")
            assert trainers.run(run) == 0
        ending = events(run)[-1]
        assert isinstance(ending, Stopped | Paused)
        return ending

    assert isinstance(asked("evaluation", 2, "stop_now"), Stopped)
    assert [event.step for event in events_of(run, Evaluated)] == [0]
    ending = asked("step", 4, "stop_now")
    assert isinstance(ending, Stopped) and ending.step == 3
    assert (
        max(step for step, _ in run.checkpoints()) == 3
        and (run.adapter_dir / "adapter_model.safetensors").exists()
    )
    ending = asked("step", 5, "pause_now")
    assert ending == Paused(at=ending.at, step=4)
    assert trainers.run(run) == 0
    assert losses(run).pop(3)  # the last step is reported, although it was not due
    expected = losses(whole)
    assert {n: loss for n, loss in losses(run).items() if n in expected} == pytest.approx(expected, abs=EXACT)
    evaluated, again = ({e.step: e.loss for e in events_of(each, Evaluated)} for each in (whole, run))
    assert again == pytest.approx(evaluated, abs=EXACT)


def test_a_pause_keeps_the_request_to_finish_after_the_epoch(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(recipe({**EVERY_STEP, "training.epochs": 3.0}))
    with monkeypatch.context() as within:
        requests = [
            f"request_within_step({str(run.path)!r}, 2, {kind!r})" for kind in ("pause_now", "finish_epoch")
        ]
        within.setenv(
            "BEFORE_TRAINER", f"from tests.training.fault_injection import *; {'; '.join(requests)}"
        )
        assert trainers.run(run) == 0
    assert events(run)[-1] == Paused(at=events(run)[-1].at, step=1)
    assert trainers.run(run) == 0
    per_epoch = events_of(run, DataReady)[0].steps_per_epoch
    asked = [event.request for event in events_of(run, RequestReceived)]
    assert asked == ["finish_epoch", "pause_now", "finish_epoch"], "the screens show it again"
    # Killed before it could say that it has finished, it trains no further epoch.
    killed = interrupted_at(run, per_epoch)
    assert trainers.run(killed) == 0
    for ended in (run, killed):
        ending = events(ended)[-1]
        assert isinstance(ending, Finished) and "as requested" in ending.reason
        assert ending.step == per_epoch < events_of(run, DataReady)[0].total_steps


def test_a_resumed_run_keeps_its_padded_rows(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        wrong.setenv(
            "BEFORE_TRAINER", "from tests.training.fault_injection import *; samples_see_each_other()"
        )
        whole = create_run(recipe(SHORT))
        assert trainers.run(whole) == 0
    assert events_of(whole, StepVerified)[0].replaced == ("attention over packed samples",)
    expected = losses(whole)
    again = interrupted_at(whole, len(expected) // 2 - 1)
    # Without the fault: packed attention passes, and would make other rows.
    assert trainers.run(again) == 0
    assert events_of(again, StepVerified)[-1].replaced == ()
    assert events_of(again, Environment)[-1].attention == "sdpa, padded sequences: as before the resume"
    assert losses(again) == pytest.approx(expected, abs=1e-4)


def test_a_smaller_micro_batch_learns_the_same(recipe: MakeRecipe, trainers: Trainers) -> None:
    whole = create_run(recipe({"training.micro_batch_size": 2, "training.gradient_accumulation": 1, **SHORT}))
    assert trainers.run(whole) == 0
    expected = losses(whole)
    step = len(expected) // 2
    again = interrupted_at(whole, step)
    plan = RetryPlan(micro_batch_size=1, gradient_accumulation=2, gradient_checkpointing="on")
    assert trainers.run(again, plan) == 0
    started = events_of(again, Started)[-1]
    assert (started.micro_batch_size, started.gradient_checkpointing) == (1, "on")
    assert all(abs(loss - expected[n]) < 1e-4 for n, loss in losses(again).items())


def test_what_was_chosen_for_free_memory_stays_through_a_resume(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training.optimizer": "auto", "training.gradient_accumulation": 4, **SHORT}
    inject_fault(monkeypatch, "choose_for_memory(2, 'adamw')")
    whole = create_run(recipe(settings))
    assert trainers.run(whole) == 0
    (chosen,) = events_of(whole, StepChosen)
    assert (chosen.micro_batch_size, chosen.gradient_accumulation, chosen.optimizer) == (2, 2, "adamw")
    expected = losses(whole)
    again = interrupted_at(whole, len(expected) // 2)
    inject_fault(monkeypatch, "choose_for_memory(4, 'adamw_8bit')")
    assert trainers.run(again) == 0
    assert events_of(again, Environment)[-1].optimizer == "adamw"
    assert losses(again) == expected


def test_a_changed_recipe_base_or_data_set_is_refused(
    recipe: MakeRecipe, trainers: Trainers, tiny_data: Path, tmp_path: Path
) -> None:
    before = recipe(SHORT)
    base = shutil.copytree(before.model.id, tmp_path / "base")
    data = tmp_path / "own.jsonl"
    data.write_bytes(tiny_data.read_bytes())
    sources = (msgspec.structs.replace(before.data.sources[0], path=str(data)),)
    run = create_run(recipe({**SHORT, "model.id": str(base), "data.sources": sources}))
    assert trainers.run(run) == 0

    def refused(name: str) -> Failed:
        again = interrupted_at(run, 2, name)
        if name == "recipe":
            own = again.recipe()
            lora = msgspec.structs.replace(own.lora, alpha=64.0)
            again.recipe_path.write_text(dump(msgspec.structs.replace(own, lora=lora, note="another note")))
        assert trainers.run(again) == 1
        ending = events(again)[-1]
        assert isinstance(ending, Failed)
        return ending

    what = refused("recipe").what
    assert "lora.alpha: 16 → 64" in what and "note" not in what
    (base / "README.md").write_text("touched")
    os.utime(base / "model.safetensors")
    assert trainers.run(interrupted_at(run, 2, "same")) == 0
    flip(base / "model.safetensors", -1)
    assert refused("base").title == "The base model has changed"
    flip(base / "model.safetensors", -1)
    data.write_text(data.read_text().replace("the answer is 7", "the answer is 8"))
    assert refused("data").title == "The data has changed"


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe(SHORT))
    assert trainers.run(run) == 0
    again = interrupted_at(run, 4)
    truncated = again.checkpoints_dir / "step-4" / "optimizer.pt"
    truncated.write_bytes(truncated.read_bytes()[:100])
    flip(again.checkpoints_dir / "step-3" / "adapter_model.safetensors", -1)
    unloadable = again.checkpoints_dir / "step-2"
    (unloadable / "optimizer.pt").write_bytes(bytes(100))
    (unloadable / "complete").unlink()
    write_checksums(unloadable)
    sizes = {file.name: file.stat().st_size for file in unloadable.iterdir()}
    (unloadable / "complete").write_text(json.dumps(sizes))
    assert trainers.run(again) == 0
    assert [event.resumed_from_step for event in events_of(again, Started)] == [0, 2, 1]
    evidence = [health.evidence for health in events_of(again, Health) if health.kind == "checkpoint_damaged"]
    assert [words[:6] for words in evidence] == ["step-4", "step-3", "step-2"]
    assert "could not be loaded" in evidence[-1]
    assert losses(again) == pytest.approx(losses(run), abs=EXACT)


AIMS: tuple[Phase, ...] = ("training", "evaluating", "saving", "probing")
ROUNDS = 4


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
