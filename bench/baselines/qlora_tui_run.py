"""This program: a run as the app starts it, in a private home folder."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Literal

import msgspec

from bench.baselines.job import TrainingJob, read_job, tell
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs import actions
from qlora_tui.runs.describe import follow_events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import (
    AdapterReady,
    AnyEvent,
    DataReady,
    Evaluated,
    Finished,
    MemoryMeasured,
    Started,
    Step,
)
from qlora_tui.runs.view import RunView


def main() -> None:
    """Train once over the rows."""
    job = read_job()
    use_private_home(job)
    run = actions.submit(recipe(job))
    ending = relay(run)
    if not isinstance(ending, Finished):
        sys.exit(f"{ending}; see {run.path}")
    Path(job.out).parent.mkdir(parents=True, exist_ok=True)
    Path(job.out).symlink_to(run.adapter_dir)


def use_private_home(job: TrainingJob) -> None:
    """Move runs, settings and caches of this process to a private folder."""
    for kind in ("CONFIG", "STATE", "CACHE"):
        os.environ[f"XDG_{kind}_HOME"] = str(Path(f"{job.out}-home") / kind.lower())


def recipe(job: TrainingJob) -> Recipe:
    """Return a recipe for the job, with one packed sequence per step."""
    return Recipe(
        model=Model(id=job.model),
        quantization=Quantization(
            method=job.method,
            double_quantization=job.double,
            compute_dtype=msgspec.convert(job.dtype, Literal["bfloat16", "float32"]),
        ),
        lora=Lora(rank=job.rank, alpha=job.alpha, dropout=job.dropout),
        data=Data(
            sources=(Source(path=job.rows),),
            validation_path=job.validation,
            validation_fraction=0.0,
            max_length=job.row_tokens,
            preferences=job.preferences or "refuse",
        ),
        training=Training(
            micro_batch_size=1,
            gradient_accumulation=1,
            epochs=1.0,
            max_steps=job.max_steps,
            learning_rate=job.learning_rate,
            lr_scheduler=job.lr_scheduler,
            warmup_ratio=job.warmup_ratio,
            optimizer="adamw",
            gradient_checkpointing="on" if job.checkpointing else "off",
            seed=job.seed,
        ),
    )


def relay(run: RunDir) -> AnyEvent | None:
    """Print the run's events as lines of :mod:`.job`; return the last event."""
    pid, share = 0, 0.0
    view = RunView(run)
    for event in follow_events(view):
        match event:
            case Started():
                pid = event.pid
            case DataReady():
                share = event.trained_tokens / event.tokens
                tell("data", hash=event.data_hash)
            case AdapterReady():
                tell("loaded", pid=pid)
            case Step():
                tell(
                    "step",
                    tokens=event.tokens,
                    trained=round(share * event.tokens),
                    loss=_number(event.loss),
                    grad_norm=_number(event.grad_norm),
                    at=event.at,
                )
            case Evaluated():
                tell("evaluated", step=event.step, loss=event.loss)
            case MemoryMeasured(when="end"):
                tell(
                    "peak",
                    allocated=event.allocated_bytes,
                    estimated=event.estimated_bytes,
                    process=event.measured_bytes,
                )
    return view.ending


def _number(value: float | None) -> float:
    """Return NaN for None, which events write for values that are not finite."""
    return math.nan if value is None else value


if __name__ == "__main__":
    main()
