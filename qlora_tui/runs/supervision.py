"""Supervises a run over its attempts: starts its trainer, records how each attempt ended, and retries.

The runner supervises the runs in this machine's queue, and a Slurm job supervises its one run
(:mod:`qlora_tui.runs.slurm_job`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import IO

from qlora_tui import paths
from qlora_tui.errors import EXIT_FAILURE, UserError
from qlora_tui.files import open_append
from qlora_tui.locks import is_locked
from qlora_tui.runs import control, run_queue
from qlora_tui.runs.devices import Devices, RunDevice, claimed, record_devices
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed, Paused
from qlora_tui.runs.gate import PERIOD_S
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.memory_retry import RetryPlan, host_oom_kills, plan_resume, plan_retry
from qlora_tui.runs.outcomes import determine_outcome, log_size, record_outcome
from qlora_tui.runs.process import (
    INHIBITOR,
    process_identity,
    spawn_detached,
    threads_variable,
    trainer_command,
)
from qlora_tui.runs.status import read_status
from qlora_tui.worker import module_argv, start_detached, subprocess_env

POLL_S = 0.5
"""Seconds between two checks of a run that another process trains."""
EXITING_S = 60.0
"""Seconds that a trainer may take to exit after recording the ending of its run."""
SWEEP_TRIES = 3
"""Maximum number of times that a sweep's process is started. It is started again only if it is killed."""
_RELEASE_S = 2.0
"""Maximum seconds to wait until the lock that prevents suspending is released."""


class Supervisor:
    """Trains queued runs to their ends. Several threads can share a supervisor, each for a different run."""

    starts_through: tuple[str, ...] = ()
    """Command that starts the trainer, such as srun."""

    def __init__(self, hold: Callable[[RunDir, Iterable[RunDevice]], Hold | None]) -> None:
        """Create a supervisor. ``hold``: returns why a run on these devices must end now; None if it may
        continue.
        """
        self._hold = hold

    def begin(self, run: RunDir, devices: Devices) -> None:
        """Train a run to its end. If a device is in use, a queued run stays in the queue.

        Raises UserError if the run is in use, or if a device is in use and the run is not queued.
        """
        deadline = time.monotonic() + EXITING_S
        # The previous trainer may still be exiting, without a parent that waits for it.
        while is_locked(run.trainer_lock_path):
            if time.monotonic() > deadline:
                raise UserError(
                    "The run is already training", what=f"Another trainer has locked {run.trainer_lock_path}."
                )
            time.sleep(POLL_S)
        self.supervise(run, plan_resume(run), devices)

    def supervise(self, run: RunDir, plan: RetryPlan | None, devices: Devices) -> None:
        """Train a run to its end with this plan, and retry with less memory if memory runs out."""
        if plan is None:
            return
        with self.claim(devices) as handles:
            if handles is None:
                if read_status(run).state == "queued":
                    # The device was taken since the check. The queue tries again.
                    return
                raise UserError("The device is in use", what=f"Another process is training on {devices}.")
            while plan is not None:
                kills_before = host_oom_kills()
                events_from, log_from = run.events_path.stat().st_size, log_size(run)
                exit_code = self._train(run, plan, devices, handles)
                self.trainer_ended(run, exit_code)
                plan = self.record_and_plan_retry(
                    run,
                    devices,
                    exit_code,
                    events_from,
                    log_from,
                    host_out_of_memory=host_oom_kills() > kills_before,
                )

    def trainer_ended(self, run: RunDir, exit_code: int) -> None:
        """Interpret the exit code before the outcome is determined. The base class does nothing."""

    def record_and_plan_retry(
        self,
        run: RunDir,
        devices: Devices,
        exit_code: int | None,
        events_from: int | None = None,
        log_from: int | None = None,
        *,
        host_out_of_memory: bool = False,
    ) -> RetryPlan | None:
        """Record how an attempt ended.

        Returns a plan for another attempt if using less memory can help; None otherwise.
        """
        if run.is_deleted:
            log(f"{run.id}: it was deleted while it was training")
            return None
        ending = determine_outcome(
            run,
            exit_code,
            events_from=events_from,
            log_from=log_from,
            host_out_of_memory=host_out_of_memory,
            processes=devices.processes,
        )
        try:
            record_outcome(run, ending, events_from=events_from)
            if read_status(run).state == "queued":
                # The run was resumed while its trainer was still exiting, so the queue handles it.
                return None
            if isinstance(ending, Paused) and ending.hold is not None:
                # Do not requeue if the user requested an ending while the trainer was exiting.
                if control.pending_ending(run) in (None, "pause_now"):
                    self.requeue(run)
                return None
            plan = plan_retry(run, ending)
            if plan is None:
                run.now_path.unlink(missing_ok=True)
        except OSError as error:
            # A full disk must not end the queue. The run then reads as lost, and the next runner records its
            # ending.
            log(f"{run.id}: its end could not be recorded: {error}")
            return None
        if plan is None:
            self._report_end(run)
        return plan

    def refuse(self, run: RunDir, problem: UserError) -> None:
        """Record that a run failed before it was started. Raises OSError."""
        run_queue.take(run, process_identity())
        record_outcome(run, Failed.from_problem(problem, at=time.time(), exit_code=problem.exit_code))
        self._report_end(run)

    def ask_to_give_way(self, run: RunDir, devices: Devices) -> bool:
        """If a run in training must not train now, ask it to save and to free its devices.

        Returns whether it was asked.
        """
        hold = self._hold(run, devices.devices)
        if hold is not None:
            with suppress(UserError):
                control.send_request(run, "pause_now", hold=hold)
                return True
        return False

    def claim(self, devices: Devices) -> AbstractContextManager[tuple[int, ...] | None]:
        """Lock a run's devices inside the block.

        Yields the file descriptors that the trainer must inherit, or None if a device is in use.
        """
        return claimed(devices)

    def awake(self) -> AbstractContextManager[None]:
        """Prevent the machine from suspending inside the block."""
        return _awake()

    def take(self, run: RunDir, devices: Devices) -> None:
        """Record that this process starts a trainer for the run. Raises OSError."""
        run.unreported_path.touch(mode=0o600)
        record_devices(run, devices)
        run_queue.take(run, process_identity())

    def start(
        self, run: RunDir, devices: Devices, arguments: list[str], handles: tuple[int, ...], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a trainer. Raises OSError."""
        return spawn_detached(
            *trainer_command(run.path, devices.processes, *arguments),
            output=output,
            environ=threads_variable(devices.processes),
            inherited=handles,
            through=self.starts_through,
        )

    def code_of_trainer(self, exit_code: int) -> int:
        """Return the trainer's exit code, given the exit code of the program that was started. The result is
        negative if a signal ended the trainer.
        """
        return exit_code

    def requeue(self, run: RunDir) -> None:
        """Put a run back in its place in the queue after it has freed its devices. Raises OSError."""
        run_queue.requeue(run, first=True)

    def notify(self, run: RunDir) -> None:
        """Notify the user of how a run ended. If the run belongs to a sweep, advance the sweep instead,
        which notifies the user when the sweep ends.

        Raises OSError, UserError.
        """
        if sweep := run.sweep:
            # Advance sweeps before removing the mark of an unhandled ending: if this runner is killed now,
            # the next one repeats it.
            advance_sweeps(sweep)
            with suppress(OSError):
                run.unreported_path.unlink(missing_ok=True)
            return
        # Remove the mark before notifying: if this runner is killed now, the next one must not notify again.
        run.unreported_path.unlink(missing_ok=True)
        start_detached("qlora_tui.runs.notify:notify", run.path, stdout=subprocess.DEVNULL, stderr=None)

    def _report_end(self, run: RunDir) -> None:
        try:
            self.notify(run)
        except (OSError, UserError) as error:
            log(f"{run.id}: the notification failed: {error}")

    def _train(self, run: RunDir, plan: RetryPlan, devices: Devices, handles: tuple[int, ...]) -> int:
        """Run one trainer to its end and return its exit code.

        Raises OSError if the run's log, or the record that its trainer starts, cannot be written.
        """
        arguments = [*plan.to_arguments(), *devices.to_arguments()]
        with open_append(run.log_path) as output:
            self.take(run, devices)
            try:
                trainer = self.start(run, devices, arguments, handles, output)
            except OSError as error:
                output.write(f"The trainer could not be started: {error}\n".encode())
                return EXIT_FAILURE
        process, is_asked = process_identity(trainer.pid), False
        with self.awake():
            while (exit_code := trainer.poll()) is None:
                process.wait(PERIOD_S)
                is_asked = is_asked or self.ask_to_give_way(run, devices)
        return self.code_of_trainer(exit_code)


def advance_sweeps(*ids: str) -> None:
    """Make sweeps queue their next runs, in a separate process; by default all active sweeps.

    The queue continues whatever the process does. A killed process is started again, because repeating its
    work is harmless.
    """
    try:
        if not ids and not any(paths.sweeps_dir().glob("*/active")):
            return
    except OSError:
        # The folder does not exist yet, and the disk is full.
        return
    for _ in range(SWEEP_TRIES):
        with suppress(OSError):
            argv = module_argv("qlora_tui.sweeps.driver", *ids)
            if subprocess.run(argv, stdin=subprocess.DEVNULL, env=subprocess_env()).returncode >= 0:
                return


def log(message: object) -> None:
    """Write to the log of this process. Errors are ignored, because a full disk must not end the queue."""
    with suppress(OSError):
        print(message, file=sys.stderr)


@contextmanager
def _awake() -> Iterator[None]:
    """Prevent the machine from suspending inside the block, since a suspended GPU loses its memory.

    Works if systemd runs and allows this user. The lock is held by a child process that ends when its input
    closes, and so ends with this process, however this process ends.
    """
    program, holder = shutil.which(INHIBITOR), None
    if program is not None:
        options = ["--what=idle:sleep", "--mode=block", "--who=qlora-tui", "--why=A run is in training."]
        with suppress(OSError):
            holder = subprocess.Popen(
                [program, *options, "cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Signals to this process group must not reach the process that holds the lock.
                start_new_session=True,
            )
    try:
        yield
    finally:
        if holder is not None:
            with suppress(subprocess.TimeoutExpired):
                holder.communicate(timeout=_RELEASE_S)
