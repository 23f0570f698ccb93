"""Runs as the trainer would have written them, made up: for screens in states that a real run seldom has."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from qlora_tui import paths
from qlora_tui.files import private_dir
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Source
from qlora_tui.recipe.toml import dump
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import (
    AdapterReady,
    AnyEvent,
    CheckpointSaved,
    DataReady,
    Environment,
    Evaluated,
    Failed,
    Finished,
    Health,
    MemoryMeasured,
    Paused,
    PhaseChanged,
    Queued,
    RunEnded,
    SampleGenerated,
    Started,
    Step,
    Stopped,
    ValidationCompared,
)
from qlora_tui.runs.events import encode as encode_event
from qlora_tui.runs.process import ProcessIdentity, process_identity
from qlora_tui.runs.status import State, Status, ended_status, write_status
from qlora_tui.runs.telemetry import Reading, encode

GIB = 1 << 30
BEGAN = 1_795_400_000.0
"""23 November 2026, 02:13:20 UTC."""

_WATTS = 312
_OTHER_PROGRAM_S = 30
"""Time before an out-of-memory failure at which the other program of its report took its memory."""
_FREE_AT_FAILURE_BYTES = 410 << 20

BEFORE_TRAINING = 2.71
"""Validation loss before training."""

TICKETS = Recipe(
    name="qwen2.5-7b-tickets",
    model=Model(id="Qwen/Qwen2.5-7B-Instruct"),
    data=Data(sources=(Source(path="/data/tickets.jsonl"),), max_length=2048),
    lora=Lora(rank=16),
    training=Training(micro_batch_size=2, epochs=2.0),
)


@dataclass(frozen=True, kw_only=True)
class FakeRun:
    """What the run was like."""

    name: str = "qwen2.5-7b-tickets-20261123-0212"
    state: State = "running"
    steps: int = 1240
    total: int = 3000
    seconds_a_step: float = 1.5
    nan: Container[int] = ()
    seed: int = 1
    began: float = BEGAN
    failed: Failed | None = None
    has_gpu: bool = True
    health: bool = False
    recipe: Recipe = TICKETS
    final_loss: float = 1.22
    """Training loss that the run approaches."""
    exact: tuple[float, float] | None = None
    """Share of exact answers before training and at its end, for short-answer data."""


def write_fake_run(what: FakeRun) -> RunDir:
    """Write the run's directory."""
    run = RunDir(private_dir(paths.runs_dir() / what.name))
    run.recipe_path.write_text(dump(what.recipe))
    os.utime(run.recipe_path, (what.began, what.began))
    events, telemetry = _encoded(what, BEFORE_TRAINING)
    run.events_path.write_bytes(events)
    if what.steps:
        run.telemetry_path.write_bytes(telemetry)
        run.log_path.write_text("\n".join(_output(what)) + "\n")
    if what.state == "queued":
        run_queue.enqueue(run)
    write_status(run, _status(what))
    return run


_written: dict[str, tuple[bytes, bytes]] = {}
"""Tests write the same runs again and again, with thousands of events."""


def _encoded(what: FakeRun, before_training: float) -> tuple[bytes, bytes]:
    key = f"{before_training} {what}"
    if key not in _written:
        events = b"".join(map(encode_event, _events(what)))
        _written[key] = events, b"".join(map(encode, _telemetry(what)))
    return _written[key]


def last_at(what: FakeRun) -> float:
    """Unix time of the last step."""
    return _at(what, what.steps)


def _at(what: FakeRun, step: float) -> float:
    return what.began + 40 + step * what.seconds_a_step


def _loss(what: FakeRun, step: int) -> float:
    return what.final_loss + 1.5 * math.exp(-step / (what.total / 9))


def _validation_loss(what: FakeRun, step: int) -> float:
    """Follows the training loss in the first half of the run, and rises above it after that."""
    worse = max(0.0, 0.00012 * (step - what.total / 2))
    return round(_loss(what, step) + 0.05 + worse, 4)


def _rewards(what: FakeRun, step: int) -> dict[str, Any]:
    """What a preference method measures, which rises over the run; nothing without one."""
    if what.recipe.preference_method is None:
        return {}
    share = step / what.total
    return {"reward_accuracy": 0.5 + 0.4 * share, "reward_margin": round(0.8 * share, 4)}


def _accuracy(what: FakeRun, step: int) -> float | None:
    return what.exact and what.exact[0] + (what.exact[1] - what.exact[0]) * step / what.total


def _events(what: FakeRun) -> list[AnyEvent]:
    began = what.began
    events: list[AnyEvent] = [Queued(at=began)]
    if what.state == "queued":
        return events
    events += [
        Started(
            at=began + 1,
            attempt=1,
            pid=4242,
            micro_batch_size=2,
            gradient_accumulation=8,
            gradient_checkpointing="auto",
        ),
        PhaseChanged(at=began + 2, phase="loading"),
        Environment(
            at=began + 9,
            device="NVIDIA GeForce RTX 4090" if what.has_gpu else "AMD EPYC 7B13",
            device_kind="cuda" if what.has_gpu else "cpu",
            device_total_bytes=24 * GIB,
            compute_dtype="bfloat16",
            attention="sdpa",
            optimizer="paged_adamw_8bit",
            loss="chunked",
            versions={"torch": "2.13.0"},
        ),
        AdapterReady(at=began + 20, trained_parameters=40_370_176, total_parameters=7_655_986_688),
        PhaseChanged(at=began + 21, phase="tokenizing"),
        DataReady(
            at=began + 30,
            samples=8 * what.total,
            validation_samples=max(1, what.total * 2 // 5),
            tokens=1750 * what.total,
            trained_tokens=600 * what.total,
            rows=8 * what.total,
            steps_per_epoch=what.total // 2,
            total_steps=what.total,
            data_hash="0f",
            cut=12,
        ),
        PhaseChanged(at=began + 31, phase="probing"),
        MemoryMeasured(
            at=began + 38,
            when="probe",
            estimated_bytes=round(17.9 * GIB) if what.has_gpu else round(1.7 * GIB),
            measured_bytes=round(18.2 * GIB) if what.has_gpu else round(1.6 * GIB),
        ),
        Evaluated(
            at=began + 39, step=0, loss=BEFORE_TRAINING, accuracy=_accuracy(what, 0), **_rewards(what, 0)
        ),
        PhaseChanged(at=began + 40, phase="training"),
    ]
    compared = ValidationCompared(
        at=_at(what, what.steps) + 1,
        rows=128,
        before=BEFORE_TRAINING,
        after=_validation_loss(what, what.steps),
        low=-1.44,
        high=-1.31,
    )
    endings = [compared] if what.state == "finished" else []
    return events + _steps(what) + endings + [e for e in [_ending(what)] if e is not None]


def _steps(what: FakeRun) -> list[AnyEvent]:
    luck = random.Random(what.seed)
    every = max(1, what.total // 15)
    best = BEFORE_TRAINING
    events: list[AnyEvent] = []
    for step in range(1, what.steps + 1):
        lost = step in what.nan
        events.append(
            Step(
                at=_at(what, step),
                step=step,
                epoch=2 * step / what.total,
                loss=None if lost else round(_loss(what, step) + luck.gauss(0, 0.11), 4),
                learning_rate=2e-4
                * min(1.0, step / 90)
                * (0.5 + 0.5 * math.cos(math.pi * step / what.total)),
                grad_norm=None if lost else round(abs(luck.gauss(0.42, 0.08)), 4),
                tokens=step * 3500,
                tokens_per_s=round(2310 + luck.gauss(0, 40), 1),
                **_rewards(what, step),
            )
        )
        if lost and what.health:
            events.append(
                Health(
                    at=_at(what, step),
                    kind="nan_loss",
                    severity="error",
                    evidence=f"The loss is not a number at step {step}.",
                    remedy="Lower Learning rate, or use bfloat16 where the GPU has it.",
                    step=step,
                )
            )
        if step % every == 0:
            loss = _validation_loss(what, step)
            events += _milestone(what, step, loss, best=loss < best)
            best = min(best, loss)
    return events


def _milestone(what: FakeRun, step: int, loss: float, *, best: bool) -> list[AnyEvent]:
    at = _at(what, step) + 0.5
    return [
        Evaluated(
            at=at,
            step=step,
            loss=loss,
            best=best,
            accuracy=_accuracy(what, step),
            **_rewards(what, step),
        ),
        CheckpointSaved(at=at, step=step, folder=f"checkpoints/step-{step}"),
        SampleGenerated(
            at=at,
            step=step,
            prompt="My parcel is late. What can I do?",
            answer="I am sorry to hear that.\nPlease send me your order number, and I will look where it is.",
        ),
    ]


def _ending(what: FakeRun) -> RunEnded | None:
    at = _at(what, what.steps) + 2
    match what.state:
        case "finished":
            seconds = what.steps * what.seconds_a_step
            energy = round(seconds * _WATTS / 3.6e6, 3)
            return Finished(at=at, step=what.steps, seconds=seconds, tokens_per_s=2311.0, energy_kwh=energy)
        case "failed":
            return what.failed or Failed(
                at=at,
                title="Out of GPU memory",
                what="The trainer requested 1.5 GiB, and 410 MiB of the GPU's 24.0 GiB was free.",
                why="Another program held 5.1 GiB of the GPU's memory.",
                fix="Close the other program and resume. The cheapest change that should fit: micro-batch 1.",
                kind="out_of_memory",
                missing_bytes=round(1.1 * GIB),
                others_bytes=round(5.1 * GIB),
            )
        case "stopped":
            return Stopped(at=at, step=what.steps)
        case "paused":
            return Paused(at=at, step=what.steps)
        case _:
            return None


def _status(what: FakeRun) -> Status:
    process = None
    if what.state in ("starting", "running"):
        process = process_identity()
    elif what.state == "lost":
        process = ProcessIdentity(pid=1, boot_id=process_identity().boot_id)
    ending = _ending(what)
    return Status(
        state="running" if what.state == "lost" else what.state,
        at=_at(what, what.steps) + 2,
        process=process,
        phase="training" if what.state in ("running", "lost") else None,
        step=what.steps,
        total_steps=what.total,
        loss=_loss(what, what.steps) if what.steps else None,
        detail="" if ending is None else ended_status(ending).detail,
    )


def _telemetry(what: FakeRun) -> list[Reading]:
    luck = random.Random(what.seed)
    recent = _at(what, what.steps) - 239
    earlier = [recent - ago for ago in range(5, round(recent - _at(what, 0)), 5)]
    return [_sample(what, at, luck) for at in (*reversed(earlier), *(recent + s for s in range(240)))]


def _sample(what: FakeRun, at: float, luck: random.Random) -> Reading:
    ending = _ending(what)
    has_other = isinstance(ending, Failed) and ending.others_bytes and at > ending.at - _OTHER_PROGRAM_S
    gpu = GpuMetrics(
        at=at,
        index=0,
        utilization_percent=min(100, round(96 + luck.gauss(0, 2))),
        memory_used_bytes=24 * GIB - _FREE_AT_FAILURE_BYTES if has_other else round(18.2 * GIB),
        memory_total_bytes=24 * GIB,
        power_w=round(_WATTS + luck.gauss(0, 9), 1),
        power_limit_w=450.0,
        temperature_c=61,
        sm_clock_mhz=2520,
        fan_percent=46,
        throttle=(),
    )
    return Reading(
        at=at,
        rss_bytes=round(3.1 * GIB) if what.has_gpu else round(1.6 * GIB),
        cpu_percent=104.0 if what.has_gpu else round(188 + luck.gauss(0, 5), 1),
        gpu=gpu if what.has_gpu else None,
    )


def _output(what: FakeRun) -> list[str]:
    return [
        "02:13:22 loading: Qwen/Qwen2.5-7B-Instruct",
        "02:13:41 tokenizing",
        "Map: 10%|#         |\rMap: 100%|##########|",
        "02:14:00 training",
    ]
