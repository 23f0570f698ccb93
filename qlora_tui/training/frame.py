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
from qlora_tui.runs.detached import ensure_runner
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.endings import settle
from qlora_tui.runs.events import Failed, Started, Terminal
from qlora_tui.runs.locks import PATIENCE_S, locked
from qlora_tui.runs.log import EventTail
from qlora_tui.runs.retry import Plan
from qlora_tui.training import checkpoints
from qlora_tui.training.asked import Requests
from qlora_tui.training.checkpoints import Checkpoint, UnloadableCheckpoint
from qlora_tui.training.failure import failed
from qlora_tui.training.processes import Processes, processes
from qlora_tui.training.reporter import Reporter


def run_trainer(run: RunDir, plan: Plan) -> int:
    """Take a run to its end. The exit code: 0 finished, stopped or paused; 1 failed; 2 wrongly called."""
    among = processes()
    if not among.is_first:
        # The first one holds the run for all of them.
        return _run(run, plan, among)
    with _only_trainer(run) as alone:
        if not alone:
            raise UserError(
                "The run is in training",
                what=f"Another trainer has {run.path}.",
                fix="Wait for it, or stop it first.",
                exit_code=EXIT_USAGE,
            )
        return _run(run, plan, among)


def _run(run: RunDir, plan: Plan, among: Processes) -> int:
    reporter = Reporter(run, mute=not among.is_first)
    requests = Requests(run, reporter, among)
    requests.listen_to_signals()
    reporter.start()
    ending = _attempt(run, plan, reporter, requests, among)
    reporter.log(f"{type(ending).__name__.lower()}{f': {ending.what}' if isinstance(ending, Failed) else ''}")
    reporter.tell(ending)
    reporter.stop()
    if among.is_first:
        # On a full disk the status stays as the last heartbeat left it, and reads as lost.
        with suppress(OSError):
            settle(run, ending)
            if run.untold_path.exists():
                # Where the runner was killed meanwhile, another tells of the end and takes up the queue.
                ensure_runner()
    if isinstance(ending, Failed):
        return ending.exit_code or EXIT_FAILURE
    return 0


def _attempt(run: RunDir, plan: Plan, reporter: Reporter, requests: Requests, among: Processes) -> Terminal:
    number = 1 + sum(isinstance(event, Started) for event in EventTail(run.events_path).drain())
    estimate: Estimate | None = None
    recipe: Recipe | None = None
    try:
        try:
            recipe = plan.applied(run.recipe())
            if among.is_first:
                leftovers.restore(run)
                leftovers.sweep_own(run)
            checkpoint, damage = checkpoints.latest(run)
        except UserError:
            reporter.tell(Started(at=time.time(), attempt=number, pid=os.getpid()))
            raise
        _tell_started(reporter, recipe, checkpoint, number)
        _tell_damage(reporter, damage)
        require_runnable(recipe)
        reporter.phase("loading", "libraries")
        from qlora_tui.training.run import Attempt

        while True:
            attempt = Attempt(run, recipe, checkpoint, reporter, requests, among)
            try:
                return attempt.train()
            except UnloadableCheckpoint as error:
                # Under several processes the others may have loaded theirs, and wait.
                if checkpoint is None or among.count > 1:
                    raise
                damage = [error.what.rstrip(".")]
            finally:
                estimate = attempt.meter.estimate if attempt.meter else None
            del attempt
            gc.collect()
            checkpoint, more_damage = checkpoints.latest(run, before=checkpoint.step)
            number += 1
            _tell_started(reporter, recipe, checkpoint, number)
            _tell_damage(reporter, damage + more_damage)
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, UserError):
            reporter.log(traceback.format_exc())
        return failed(error, run, recipe, estimate)


def _tell_damage(reporter: Reporter, damage: list[str]) -> None:
    for what in damage:
        remedy = "An earlier one is used. Check the disk if it happens again."
        reporter.health("checkpoint_damaged", f"{what}.", remedy)


def _tell_started(reporter: Reporter, recipe: Recipe, checkpoint: Checkpoint | None, number: int) -> None:
    step = checkpoint.step if checkpoint else 0
    reporter.tell(
        Started(
            at=time.time(),
            attempt=number,
            pid=os.getpid(),
            resumed_from_step=step,
            micro_batch=recipe.training.micro_batch,
            gradient_accumulation=recipe.training.gradient_accumulation,
            gradient_checkpointing=recipe.training.gradient_checkpointing,
        )
    )
    reporter.goes_on_from(step)


@contextmanager
def _only_trainer(run: RunDir) -> Iterator[bool]:
    """Hold the run for this process; the kernel lets go of it however the process ends."""
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as lock:
        yield lock is not None
