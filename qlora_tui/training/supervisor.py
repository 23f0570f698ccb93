"""Runs the attempts at a run: one trainer per run, a heartbeat, and an event for every way to end.

torch is imported inside functions, so that a run is shown as started, and can be stopped, during the import.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from qlora_tui.data.tokenizer_files import is_panic
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.locks import PATIENCE_S, locked
from qlora_tui.memory import Estimate
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import leftovers
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import Failed, RunEnded, Started
from qlora_tui.runs.memory_retry import RetryPlan
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.process import ensure_runner
from qlora_tui.training import checkpoints
from qlora_tui.training.checkpoints import Checkpoint, UnloadableCheckpoint
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.distributed import (
    DistributedContext,
    ProcessFailures,
    distributed_context,
    end_with_launcher,
    require_whole_model,
)
from qlora_tui.training.failures import failure_event
from qlora_tui.training.host import release_gpu_memory
from qlora_tui.training.reporter import Reporter


def run_trainer(run: RunDir, plan: RetryPlan) -> int:
    """Train a run to its end, and record how it ended.

    Returns:
        The exit code: 0 for finished, stopped or paused; for failed, the event's own code or 1.

    Raises:
        UserError: another trainer is working on the run.
    """
    dist = distributed_context()
    end_with_launcher()
    # The main process holds the lock for all processes of the run.
    with _run_lock(run) if dist.is_main_process else nullcontext():
        reporter = Reporter(run, mute=not dist.is_main_process)
        requests = ControlRequests(run, reporter, dist)
        requests.listen_to_signals()
        failures = ProcessFailures(run, dist)
        failures.watch(lambda failure: _record_end(run, reporter, failure))
        reporter.start()
        end_event = _run_attempts(run, plan, reporter, requests, dist)
        failures.stop()
        if isinstance(end_event, Failed):
            end_event = failures.report(end_event)
            if dist.world_size > 1 and end_event.kind == "bug" and requests.is_terminated:
                # torchrun ends this process because another one was killed, which the runner records.
                return EXIT_FAILURE
        _record_end(run, reporter, end_event)
    return (end_event.exit_code or EXIT_FAILURE) if isinstance(end_event, Failed) else 0


def _record_end(run: RunDir, reporter: Reporter, end_event: RunEnded) -> None:
    """Report how a run ended. Only the main process reports."""
    reason = f": {end_event.what}" if isinstance(end_event, Failed) else ""
    reporter.log(f"{type(end_event).__name__.lower()}{reason}")
    reporter.emit(end_event)
    reporter.stop()
    if reporter.is_mute:
        return
    # On a full disk the status stays as the last heartbeat wrote it, and the run is shown as lost.
    with suppress(OSError):
        record_outcome(run, end_event)
        if run.unreported_path.exists():
            # The runner may have been killed: start another one, which notifies and continues the queue.
            ensure_runner()


def _run_attempts(
    run: RunDir, plan: RetryPlan, reporter: Reporter, requests: ControlRequests, dist: DistributedContext
) -> RunEnded:
    """Attempt the run, and return the event of its end, which is ``Failed`` after an error.

    If a checkpoint does not load, a run with a single process is attempted again from an earlier one.
    """
    number = 1 + sum(isinstance(event, Started) for event in EventTail(run.events_path).drain())
    estimate: Estimate | None = None
    recipe: Recipe | None = None
    try:
        try:
            require_whole_model()
            recipe = plan.apply_to(run.recipe())
            if dist.world_size > 1:
                # Check this however the run was launched: not every setting is possible with several
                # processes.
                recipe = replace_setting(recipe, "training.gpus", dist.world_size)
            if dist.is_main_process:
                leftovers.restore(run)
                leftovers.sweep_own(run)
            checkpoint, damage = checkpoints.latest(run)
        except UserError:
            reporter.emit(Started(attempt=number, pid=os.getpid()))
            raise
        _emit_started(reporter, recipe, checkpoint, number)
        _report_damage(reporter, damage)
        require_runnable(recipe)
        reporter.phase("loading", "libraries")
        with faster_imports():
            from qlora_tui.training.attempt import run_attempt
            from qlora_tui.training.run import Run

        while True:
            attempt = Run(
                directory=run,
                recipe=recipe,
                checkpoint=checkpoint,
                reporter=reporter,
                requests=requests,
                dist=dist,
                max_kept_layers=plan.kept_layers,
                has_run_out=plan.micro_batch_size is not None,
            )
            try:
                return run_attempt(attempt)
            except UnloadableCheckpoint as error:
                # With several processes, the others may have loaded the checkpoint and be waiting for this
                # one.
                if checkpoint is None or dist.world_size > 1:
                    raise
                damage = [error.what.rstrip(".")]
            finally:
                estimate = attempt.meter.estimate if hasattr(attempt, "meter") else None
            del attempt
            release_gpu_memory()
            checkpoint, more_damage = checkpoints.latest(run, before=checkpoint.step)
            number += 1
            _emit_started(reporter, recipe, checkpoint, number)
            _report_damage(reporter, damage + more_damage)
    except BaseException as error:
        if not (isinstance(error, Exception | KeyboardInterrupt) or is_panic(error)):
            raise
        if not isinstance(error, UserError):
            reporter.log(traceback.format_exc())
        return failure_event(error, run, recipe, estimate)


def _report_damage(reporter: Reporter, damage: list[str]) -> None:
    for what in damage:
        remedy = "An earlier checkpoint is used. Check the disk if this happens again."
        reporter.health("checkpoint_damaged", f"{what}.", remedy)


def _emit_started(reporter: Reporter, recipe: Recipe, checkpoint: Checkpoint | None, number: int) -> None:
    step = checkpoint.step if checkpoint else 0
    reporter.emit(
        Started(
            attempt=number,
            pid=os.getpid(),
            resumed_from_step=step,
            **RetryPlan.from_settings(recipe.training).overrides(),
        )
    )
    reporter.resume_from(step)


@contextmanager
def _run_lock(run: RunDir) -> Iterator[None]:
    """Hold the run's lock for this process; the kernel releases it however the process ends.

    Raises:
        UserError: another process holds the lock.
    """
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as lock:
        if lock is None:
            raise UserError(
                "The run is already training",
                what=f"Another trainer is working on {run.path}.",
                fix="Wait for it to end, or stop it first.",
                exit_code=EXIT_USAGE,
            )
        yield
