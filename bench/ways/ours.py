"""This program: a run as the app would start it, in a private home."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.ways.work import Work, given, tell
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source, Training
from qlora_tui.runs import actions
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
from qlora_tui.runs.following import followed
from qlora_tui.runs.view import RunView


def main() -> None:
    """Train once over the rows."""
    work = given()
    home = Path(f"{work.out}-home")
    for kind in ("CONFIG", "STATE", "CACHE"):
        os.environ[f"XDG_{kind}_HOME"] = str(home / kind.lower())
    run = actions.submit(recipe(work))
    ending = relay(run)
    if not isinstance(ending, Finished):
        sys.exit(f"{ending}; see {run.path}")
    Path(work.out).parent.mkdir(parents=True, exist_ok=True)
    Path(work.out).symlink_to(run.adapter_dir)


def recipe(work: Work) -> Recipe:
    """The same work in this program's words: packed rows, one a step."""
    return Recipe(
        model=Model(id=work.model),
        quantization=Quantization(
            method=work.method, double_quantization=work.double, compute_dtype=work.dtype
        ),
        lora=Lora(rank=work.rank, alpha=work.alpha, dropout=work.dropout),
        data=Data(
            sources=(Source(path=work.rows),),
            validation_path=work.validation,
            validation_fraction=0.0,
            max_length=work.row_tokens,
        ),
        training=Training(
            micro_batch=1,
            gradient_accumulation=1,
            epochs=1.0,
            learning_rate=work.learning_rate,
            schedule="constant",
            warmup=0.0,
            optimizer="adamw",
            gradient_checkpointing=work.checkpointing,
            seed=work.seed,
        ),
    )


def relay(run: RunDir) -> AnyEvent | None:
    """Tell the run's events in the words of :mod:`.work`; how it ended."""
    pid, share = 0, 0.0
    view = RunView(run)
    for event in followed(view):
        match event:
            case Started():
                pid = event.pid
            case DataReady():
                share = event.trained_tokens / event.tokens
            case AdapterReady():
                tell("loaded", pid=pid)
            case Step():
                tell(
                    "step",
                    tokens=event.tokens,
                    trained=round(share * event.tokens),
                    loss=event.loss,
                    at=event.at,
                )
            case Evaluated():
                tell("evaluated", step=event.step, loss=event.loss)
            case MemoryMeasured(when="end"):
                tell("peak", allocated=event.allocated_bytes, estimated=event.estimated_bytes)
    return view.ending


if __name__ == "__main__":
    main()
