"""Everything around an attempt: one trainer a run, a heartbeat, and each end told.

torch is imported within, so that a run shows as started, and can be stopped, while that takes its seconds.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.memory import Estimate
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import leftovers
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import Failed, RunEnded, Started
from qlora_tui.runs.locks import PATIENCE_S, locked
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.retry import RetryPlan
from qlora_tui.runs.spawn import ensure_runner
from qlora_tui.training import checkpoints
from qlora_tui.training.checkpoints import Checkpoint, UnloadableCheckpoint
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.distributed import DistributedContext, distributed_context
from qlora_tui.training.failure import failure_event
from qlora_tui.training.reporter import Reporter


def run_trainer(run: RunDir, plan: RetryPlan) -> int:
    """Take a run to its end. The exit code: 0 finished, stopped or paused; 1 failed; 2 wrongly called."""
    dist = distributed_context()
    if not dist.is_main_process:
        # The first one holds the run for all of them.
        return _supervise(run, plan, dist)
    with _run_lock(run) as alone:
        if not alone:
            raise UserError(
                "The run is in training",
                what=f"Another trainer has {run.path}.",
                fix="Wait for it, or stop it first.",
                exit_code=EXIT_USAGE,
            )
        return _supervise(run, plan, dist)


def _supervise(run: RunDir, plan: RetryPlan, dist: DistributedContext) -> int:
    reporter = Reporter(run, mute=not dist.is_main_process)
    requests = ControlRequests(run, reporter, dist)
    requests.listen_to_signals()
    reporter.start()
    end_event = _run_attempts(run, plan, reporter, requests, dist)
    reporter.log(
        f"{type(end_event).__name__.lower()}{f': {end_event.what}' if isinstance(end_event, Failed) else ''}"
    )
    reporter.emit(end_event)
    reporter.stop()
    if dist.is_main_process:
        # On a full disk the status stays as the last heartbeat left it, and reads as lost.
        with suppress(OSError):
            record_outcome(run, end_event)
            if run.unreported_path.exists():
                # Where the runner was killed meanwhile, another tells of the end and takes up the queue.
                ensure_runner()
    if isinstance(end_event, Failed):
        return end_event.exit_code or EXIT_FAILURE
    return 0


def _run_attempts(
    run: RunDir, plan: RetryPlan, reporter: Reporter, requests: ControlRequests, dist: DistributedContext
) -> RunEnded:
    number = 1 + sum(isinstance(event, Started) for event in EventTail(run.events_path).drain())
    estimate: Estimate | None = None
    recipe: Recipe | None = None
    try:
        try:
            recipe = plan.applied(run.recipe())
            if dist.is_main_process:
                leftovers.restore(run)
                leftovers.sweep_own(run)
            checkpoint, damage = checkpoints.latest(run)
        except UserError:
            reporter.emit(Started(at=time.time(), attempt=number, pid=os.getpid()))
            raise
        _emit_started(reporter, recipe, checkpoint, number)
        _report_damage(reporter, damage)
        require_runnable(recipe)
        reporter.phase("loading", "libraries")
        from qlora_tui.training.attempt import TrainingAttempt

        while True:
            attempt = TrainingAttempt(run, recipe, checkpoint, reporter, requests, dist)
            try:
                return attempt.train()
            except UnloadableCheckpoint as error:
                # Under several processes the others may have loaded theirs, and wait.
                if checkpoint is None or dist.world_size > 1:
                    raise
                damage = [error.what.rstrip(".")]
            finally:
                estimate = attempt.meter.estimate if attempt.meter else None
            del attempt
            gc.collect()
            checkpoint, more_damage = checkpoints.latest(run, before=checkpoint.step)
            number += 1
            _emit_started(reporter, recipe, checkpoint, number)
            _report_damage(reporter, damage + more_damage)
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, UserError):
            reporter.log(traceback.format_exc())
        return failure_event(error, run, recipe, estimate)


def _report_damage(reporter: Reporter, damage: list[str]) -> None:
    for what in damage:
        remedy = "An earlier one is used. Check the disk if it happens again."
        reporter.health("checkpoint_damaged", f"{what}.", remedy)


def _emit_started(reporter: Reporter, recipe: Recipe, checkpoint: Checkpoint | None, number: int) -> None:
    step = checkpoint.step if checkpoint else 0
    reporter.emit(
        Started(
            at=time.time(),
            attempt=number,
            pid=os.getpid(),
            resumed_from_step=step,
            **RetryPlan.used_by(recipe.training).overrides(),
        )
    )
    reporter.resume_from(step)


@contextmanager
def _run_lock(run: RunDir) -> Iterator[bool]:
    """Hold the run for this process; the kernel lets go of it however the process ends."""
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as lock:
        yield lock is not None
