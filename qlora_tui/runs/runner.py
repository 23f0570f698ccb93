"""The runner: takes queued runs when their devices are free, and supervises each run's trainer in a thread.

``python -m qlora_tui.runs.runner`` is started whenever a run is queued. A lock ensures one runner per user
and machine. The runner exits when the queue is empty and nothing trains. A run that must not train now
(:mod:`qlora_tui.runs.gate`) is not started, or is paused and returned to its place in the queue. The complete
state is in files: if the runner is killed, trainers continue, and the next runner takes over.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from qlora_tui import paths
from qlora_tui.errors import EXIT_FAILURE, UserError, disk_problem
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.nvml import list_gpus
from qlora_tui.gpu.visible_devices import release_choice, with_choice
from qlora_tui.locks import PATIENCE_S, is_locked, locked
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.devices import (
    CPU,
    Devices,
    Wanted,
    choose,
    devices_of,
    taken_keys,
    wanted_devices,
)
from qlora_tui.runs.directory import RunDir, all_runs, queue_path
from qlora_tui.runs.event_log import events_backwards
from qlora_tui.runs.events import Paused, RunEnded
from qlora_tui.runs.gate import Gate
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.leftovers import sweep
from qlora_tui.runs.process import runner_lock_path
from qlora_tui.runs.slurm_runs import is_on_cluster
from qlora_tui.runs.status import ACTIVE, is_stranded, read_status, refuse_other_machines
from qlora_tui.runs.supervision import POLL_S, Supervisor, advance_sweeps, log
from qlora_tui.settings import Settings, current_settings

LOOK_S = 5.0
"""Seconds after which the devices of a waiting run are checked again, if no change was noticed."""
POSTPONE_S, MAX_POSTPONE_S = 60.0, 3600.0
"""Seconds after which a run that could not be started is tried again. ``POSTPONE_S``: the first wait.
``MAX_POSTPONE_S``: the longest wait.
"""


def main() -> int:
    """Work until the queue is empty; return the exit code. It is 0 also if another runner is active."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    release_choice()
    queue = _Queue(Gate())
    try:
        # Runs are queued before a runner is started for them. A runner that has released the lock and finds
        # the queue empty can therefore exit: a later entry starts its own runner.
        while True:
            with locked(runner_lock_path(), patience_s=PATIENCE_S) as lock:
                if lock is None:
                    return 0
                # The file is only used to describe a suspended runner.
                with suppress(OSError):
                    lock.truncate(0)
                    os.write(lock.fileno(), f"{os.getpid()}\n".encode())
                refuse_other_machines()
                advance_sweeps()
                queue.work()
                advance_sweeps()
            if not queue.waiting():
                return 0
    except UserError as problem:
        log(problem)
        return problem.exit_code
    except OSError as error:
        log(disk_problem(error) or error)
        return EXIT_FAILURE


class _Queue:
    """Starts each run as soon as its devices are free, in the order of the queue."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._supervisor = Supervisor(gate.hold)
        self._holds: dict[str, Hold | None] = {}
        """Last hold of each waiting run, by the run's id."""
        self._postponed: dict[str, tuple[float, float]] = {}
        """For each run that could not be started, by id: (time of the next attempt as returned by
        ``time.monotonic``, seconds to wait if that attempt fails).
        """
        self._training: dict[str, tuple[threading.Thread, Devices]] = {}
        """For each run in training, by id: the thread that supervises it, and the devices of the run."""
        self._has_ended = threading.Event()
        """Set when a thread has ended since the last check of the queue."""
        self._seen: tuple[list[GpuDevice], Settings] | None = None
        """The machine's GPUs and the settings at the last check of the queue."""
        self._wanted: dict[tuple[str, str], Wanted] = {}
        """Devices that runs need, by run id and chosen GPU. Cached, because it takes time to estimate the
        memory of a run.
        """

    def work(self) -> None:
        """Work until no run waits or trains."""
        # Leftovers that cannot be deleted take disk space, but prevent no run.
        with suppress(OSError, UserError):
            sweep()
            actions.empty_trash(actions.KEPT_S)
        for run in all_runs():
            if is_on_cluster(run) or not _is_unsettled(run):
                continue
            devices = devices_of(run) or Devices(())
            self._start(run, devices, partial(_take_over, supervisor=self._supervisor))
        looked_at, seen = -LOOK_S, None
        while self.waiting() or self._training:
            changed = _queue_version()
            if self._has_ended.is_set() or changed != seen or time.monotonic() - looked_at > LOOK_S:
                self._has_ended.clear()
                self._training = {
                    name: (thread, devices)
                    for name, (thread, devices) in self._training.items()
                    if thread.is_alive()
                }
                self._start_runs()
                looked_at, seen = time.monotonic(), changed
            self._has_ended.wait(POLL_S)

    def waiting(self) -> list[RunDir]:
        """Return the runs to start, the next one first."""
        folder = paths.runs_dir()
        return [RunDir(folder / name) for name in run_queue.waiting()]

    def _start_runs(self) -> None:
        """Start the runs whose devices are free. Devices that a run waits for are not given to later runs."""
        reserved = {key for _, devices in self._training.values() for key in devices.keys} | taken_keys()
        gpus: list[GpuDevice] = []
        with suppress(GpuUnavailableError):
            gpus = list_gpus()
        seen = gpus, current_settings()
        if seen != self._seen:
            self._seen, self._wanted = seen, {}
        for run in self.waiting():
            at, _ = self._postponed.get(run.id, (0.0, 0.0))
            if run.id in self._training or time.monotonic() < at:
                continue
            if not _guarded(run, partial(self._start_run, reserved)):
                self._postpone(run)

    def _postpone(self, run: RunDir) -> None:
        """Try later to start a run that could not be started. Each failure doubles the wait."""
        _, wait_s = self._postponed.get(run.id, (0.0, POSTPONE_S))
        self._postponed[run.id] = time.monotonic() + wait_s, min(2 * wait_s, MAX_POSTPONE_S)

    def _start_run(self, reserved: set[str], run: RunDir) -> None:
        """Start a run unless it has to wait. A run whose files are missing leaves the queue."""
        if not run.recipe_path.exists():
            run_queue.remove(run)
            return
        hold, devices = self._gate.hours_hold(run), None
        if hold is None:
            try:
                wanted = self._wanted_by(run, reserved)
            except UserError as problem:
                cause = problem.__cause__
                if (
                    isinstance(cause, GpuUnavailableError)
                    and cause.reason.device != "cpu"
                    and reserved - {CPU}
                ):
                    # The run needs a GPU, so wait until the driver lists the GPUs again.
                    return
                if checkpoints := run.checkpoints():
                    recipe, last = (shlex.quote(str(path)) for path in (run.recipe_path, checkpoints[-1][1]))
                    fix = (
                        f"To train its last checkpoint further: `qlora-tui train {recipe} --init-from {last}`"
                    )
                    problem = problem.replace(fix=f"{problem.fix} {fix}, with `--gpus`.")
                self._supervisor.refuse(run, problem)
                return
            used = self._gate.programs_on(run, wanted.free(reserved))
            unavailable = reserved | used.keys()
            devices = choose(wanted, unavailable)
            reserved |= unavailable - used.keys()
            if devices is None and used:
                hold = next(iter(used.values()))
            elif devices is None and wanted.is_choice:
                hold = Hold(cause="devices", devices=str(wanted))
        if run.id not in self._holds or self._holds[run.id] != hold:
            run_queue.hold(run, hold)
            self._holds[run.id] = hold
        if devices is not None:
            reserved |= devices.keys
            self._start(run, devices, self._supervisor.begin)

    def _wanted_by(self, run: RunDir, unavailable: set[str]) -> Wanted:
        """Return the devices that a run needs. While too few of them are free, this is the cached result.

        Once enough are free, the result is computed again.
        """
        key = run.id, run.gpu
        if (wanted := self._wanted.get(key)) is not None:
            used = self._gate.programs_on(run, wanted.free(unavailable))
            if len(wanted.free(unavailable | used.keys())) < wanted.count:
                return wanted
        wanted = self._wanted[key] = _wanted(run)
        return wanted

    def _start(self, run: RunDir, devices: Devices, work: Callable[[RunDir, Devices], None]) -> None:
        def guarded() -> None:
            if not _guarded(run, lambda each: work(each, devices)):
                self._postpone(run)
            self._has_ended.set()

        # The next time that the run waits, it must get the same devices, so drop the requirement.
        self._wanted.pop((run.id, run.gpu), None)
        # A daemon thread: trainers continue however the runner ends.
        thread = threading.Thread(target=guarded, name=run.id, daemon=True)
        self._training[run.id] = thread, devices
        thread.start()


def _queue_version() -> int | None:
    try:
        return queue_path().stat().st_mtime_ns
    except OSError:
        return None


def _wanted(run: RunDir) -> Wanted:
    environ = with_choice(run.gpu)
    if not run.checkpoints():
        return wanted_devices(run.recipe(), environ)
    endings = (each for each in events_backwards(run.events_path) if isinstance(each, RunEnded))
    ending = next(endings, None)
    gave_way = isinstance(ending, Paused) and ending.hold is not None
    return wanted_devices(run.recipe(), environ, devices_of(run), stays=gave_way)


def _guarded(run: RunDir, work: Callable[[RunDir], None]) -> bool:
    """Call ``work`` with a run. If it fails, log the error and return False, so that other runs continue."""
    try:
        work(run)
    except (OSError, UserError) as error:
        log(f"{run.id}: {error}")
        return False
    except Exception:
        log(f"{run.id}:\n{traceback.format_exc()}")
        return False
    return True


def _is_unsettled(run: RunDir) -> bool:
    """Return whether a killed runner left this run in training, or without a record of its ending."""
    state = read_status(run).state
    is_over = state not in ("queued", "unreadable", "gone", *ACTIVE)
    return state in ("lost", *ACTIVE) or (is_over and run.unreported_path.exists())


def _take_over(run: RunDir, devices: Devices, supervisor: Supervisor) -> None:
    """Wait for the trainer that a killed runner started, and record how the run ended."""
    if is_stranded(run):
        # The run was about to return to the queue.
        run_queue.requeue(run, first=True)
        return
    if _has_trainer(run):
        is_asked = False
        with supervisor.awake():
            while _has_trainer(run):
                process = read_status(run).process
                if process is None:
                    time.sleep(POLL_S)
                else:
                    process.wait(POLL_S)
                is_asked = is_asked or supervisor.ask_to_give_way(run, devices)
    if _is_unsettled(run):
        plan = supervisor.record_and_plan_retry(run, devices, exit_code=None)
        supervisor.supervise(run, plan, devices)


def _has_trainer(run: RunDir) -> bool:
    status = read_status(run)
    # For a lost run, the runner was killed before its trainer wrote a status.
    return status.state in ACTIVE or (status.state == "lost" and bool(is_locked(run.trainer_lock_path)))


if __name__ == "__main__":
    sys.exit(main())
