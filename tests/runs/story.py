"""A run without a trainer: the writes of create, queue, runner, trainer and its end, in order."""

from __future__ import annotations

import time
from pathlib import Path

from qlora_tui.checksums import checked_folder, digest
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import CheckpointSaved, Finished, Paused, Started
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.process import process_identity
from qlora_tui.training import checkpoints
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.reporter import Reporter
from tests.runs.damage import put_adapter
from tests.support.step_events import a_step


def submitted(recipe: Recipe) -> RunDir:
    """A run that waits."""
    run = create_run(recipe)
    run_queue.enqueue(run)
    return run


def begin(run: RunDir) -> Reporter:
    """The runner takes it and a trainer starts."""
    run_queue.take(run, process_identity())
    reporter = Reporter(run)
    reporter.start()
    reporter.emit(Started(at=time.time(), attempt=1, pid=1))
    return reporter


def train(run: RunDir, reporter: Reporter, *steps: int) -> None:
    """Take steps, with a heartbeat and a checkpoint at each; two checkpoints stay."""
    for step in steps:
        reporter.update(step=step, loss=1.0)
        reporter.emit(a_step(step, at=time.time()))
        reporter.write_heartbeat()
        checkpoints.write(run, state(run, step), lambda folder: _put_parts(folder), DistributedContext())
        reporter.emit(CheckpointSaved(at=time.time(), step=step, folder=f"checkpoints/step-{step}"))
        checkpoints.prune(run, 2, None)


def finish(run: RunDir, reporter: Reporter, step: int) -> None:
    """Write the adapter and say so."""
    with checked_folder(run.adapter_dir) as draft:
        put_adapter(draft)
    sums = digest(run.adapter_dir)
    _end(run, reporter, Finished(at=time.time(), step=step, seconds=1.0, tokens_per_s=1.0, checksums=sums))


def pause(run: RunDir, reporter: Reporter, step: int) -> None:
    """Leave the GPU."""
    _end(run, reporter, Paused(at=time.time(), step=step))


def state(run: RunDir, step: int) -> checkpoints.CheckpointState:
    """What a checkpoint says of its run."""
    recipe = run.recipe_path.read_text()
    return checkpoints.CheckpointState(
        step=step, tokens=step, data_hash="0", padding_free=True, recipe=recipe
    )


def _put_parts(folder: Path) -> None:
    put_adapter(folder)
    (folder / "optimizer.pt").write_bytes(b"moments" * 50)


def _end(run: RunDir, reporter: Reporter, ending: Finished | Paused) -> None:
    reporter.emit(ending)
    reporter.stop()
    record_outcome(run, ending)
