"""Polls the GPU and the runs once a second.

``SystemMonitor.poll_and_recover`` runs in a thread, and its result is published to all screens. If runs have
been waiting without an active runner, ``poll_and_recover`` also starts a runner.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_type_hints

import msgspec

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.gpu.torch_on_gpu import torch_problem
from qlora_tui.gpu.visible_devices import GpuChoice, choose_gpu, visible_gpus
from qlora_tui.locks import is_locked
from qlora_tui.remote.messages import from_builtins
from qlora_tui.runs import run_queue
from qlora_tui.runs.devices import RunDevice, is_free
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.exports import exports_dir, read_exports
from qlora_tui.runs.notify import RunNotification, notification_for
from qlora_tui.runs.process import ensure_runner, runner_lock_path
from qlora_tui.runs.servers import ServerStatus, running_servers
from qlora_tui.runs.slurm_runs import Watch, is_on_cluster
from qlora_tui.runs.status import ACTIVE, State, Status, read_status
from qlora_tui.tui.system_status import RunningExport, SystemStatus, read_host

if TYPE_CHECKING:
    from qlora_tui.remote.link import Link

_RETRY_S = 10.0
"""Seconds between attempts to open the GPU driver after a failure, since an attempt is slow."""
STALLED_S = 5.0
"""Seconds to wait, with runs queued and none active, before another runner is started. A runner needs some
time to start a run.
"""
_NOTIFIED: frozenset[State] = frozenset(("finished", "failed"))


@dataclass(frozen=True)
class _Exports:
    """Cached result of the last read of a run's exports."""

    folder_at: int
    """Modification time of the run's folder, in nanoseconds. It changes when a file in the folder is added or
    replaced.
    """
    changed_at: int | None
    """Modification time of the folder of exports, in nanoseconds; None for a run without exports. It changes
    when an export is started or deleted.
    """
    running: tuple[RunningExport, ...]


_SENT = (GpuDevice, GpuMetrics, GpuUnavailableError, RunDir, RunNotification, ServerStatus, Status, UserError)
"""Types of values in a :class:`SystemStatus`. The module :mod:`.system_status` imports these types only for
type checking, so that the first frame need not wait for their modules.
"""


class BoxMonitor:
    """Receives the status of another machine, which does its own polling."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._status = SystemStatus()
        self._types = get_type_hints(SystemStatus, localns={kind.__name__: kind for kind in _SENT})

    def poll_and_recover(self) -> SystemStatus:
        """Return the newest status that has arrived, with all runs that have ended since the last call."""
        link, ended = self._link, list[RunNotification]()
        for encoded in link.machine_states():
            record = msgspec.json.decode(link.here(encoded))
            fields = {name: from_builtins(value, self._types[name]) for name, value in record.items()}
            self._status = SystemStatus(**fields)
            ended += self._status.ended_runs
        problem = link.problem.what if link.problem is not None else ""
        return replace(
            self._status,
            ended_runs=tuple(ended),
            box=link.box.name,
            box_silent_s=link.silent_s,
            box_note=link.sending or problem,
        )


class SystemMonitor:
    """Polls the GPU and the runs. A poll is cheap enough to be repeated every second."""

    def __init__(self) -> None:
        self._runs: list[RunDir] = []
        self._runs_seen_at = -1
        self._statuses: dict[str, tuple[int, Status]] = {}
        """By run id: modification time of the run's folder, in nanoseconds, and the run's status at that
        time.
        """
        self._training: set[str] = set()
        """Ids of runs that were training at an earlier poll. The user is notified when they end."""
        self._exports: dict[str, _Exports] = {}
        self._cluster = Watch()
        self._driver: Nvml | None = None
        self._other_gpus: tuple[GpuDevice, ...] = ()
        """The GPUs that runs are allowed to use, except the chosen GPU."""
        self._choice: GpuChoice | None = None
        self._gpu_problem: UserError | None = None
        self._no_gpu: GpuUnavailableError | None = None
        self._retry_at = 0.0
        self._stalled_since: float | None = None
        """Monotonic time, in seconds, at which runs began to wait without an active runner; None if no run is
        waiting or a runner is active.
        """
        self._has_started_runner = False
        """Whether this monitor has started a runner. A runner continues all interrupted sweeps, so for sweeps
        without a queued run, the monitor starts a runner only once.
        """

    def poll_and_recover(self) -> SystemStatus:
        """Return the current status. If runs have been waiting for too long without a runner, start a runner.

        A missing GPU or a damaged run never raises an exception.
        """
        metrics = self._read_gpu()
        waiting_ids = tuple(run_queue.waiting())
        queued = frozenset(waiting_ids)
        self._cluster.poll(self._all_runs())
        statuses = [(run, self._status(run, is_queued=run.id in queued)) for run in self._all_runs()]
        training = [(run, status) for run, status in statuses if status.state in ACTIVE]
        active = training[0] if training else (None, None)
        is_training_here = any(not is_on_cluster(run) for run, _ in training)
        # The last active run is not always the newest run, because the queue can be reordered, and an older
        # run can be resumed.
        over = [(r, s) for r, s in statuses if s.state != "queued" or (s.hold and s.step)]
        last = active if active[0] else max(over, key=lambda pair: pair[1].at, default=(None, None))
        has_sweeps = not self._has_started_runner and any(paths.sweeps_dir().glob("*/active"))
        has_work = bool(waiting_ids) or has_sweeps
        self._restart_stalled_runner(is_stalled=has_work)
        return SystemStatus(
            is_known=True,
            gpu=self._choice.gpu if self._choice else None,
            gpu_metrics=metrics,
            other_gpus=self._other_gpus,
            other_gpu_metrics=tuple(map(self._read_other, self._other_gpus)),
            gpu_choice=self._choice.why if self._choice else "",
            no_gpu=self._no_gpu,
            gpu_problem=self._gpu_problem,
            active=active[0],
            active_status=active[1],
            also_active=tuple(run for run, _ in training[1:]),
            also_active_statuses=tuple(status for _, status in training[1:]),
            has_free_device=not is_training_here or self._has_free_gpu(),
            active_or_last=last[0],
            active_or_last_status=last[1],
            waiting_ids=waiting_ids,
            exports=tuple(export for run, _ in statuses for export in self._running_exports(run)),
            servers=tuple(running_servers()),
            ended_runs=self._ended_runs(statuses),
            host=read_host(),
        )

    def _running_exports(self, run: RunDir) -> tuple[RunningExport, ...]:
        """Return the run's exports that are being written. Export files are read only if the folder of
        exports has changed or an export was being written at the last call.
        """
        # The first export creates the folder of exports inside the run's folder. This changes the
        # modification time of the run's folder.
        folder_at = self._statuses[run.id][0]
        known = self._exports.get(run.id)
        if known is not None and known.changed_at is None and known.folder_at == folder_at:
            return ()
        try:
            changed_at = exports_dir(run).stat().st_mtime_ns
        except OSError:
            changed_at = None
        if known is None or known.changed_at != changed_at or known.running:
            exports = read_exports(run) if changed_at is not None else []
            running = (each for each in exports if each.status.state == "running")
            known = _Exports(
                folder_at, changed_at, tuple(RunningExport(run.name, each.name) for each in running)
            )
            self._exports[run.id] = known
        return known.running

    def _restart_stalled_runner(self, *, is_stalled: bool) -> None:
        """Start a runner if runs have been waiting for too long without a runner, such as after a crash of
        the machine.
        """
        now = time.monotonic()
        # A runner that is alive may have a reason to wait: the training hours have not begun, or another
        # program uses the memory.
        if not is_stalled or is_locked(runner_lock_path()):
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        elif now - self._stalled_since >= STALLED_S:
            self._stalled_since = now
            # If there is not enough memory for a process, or no space for its log, retry later.
            with suppress(OSError):
                ensure_runner()
                self._has_started_runner = True

    def _ended_runs(self, statuses: list[tuple[RunDir, Status]]) -> tuple[RunNotification, ...]:
        ended = [run for run, status in statuses if run.id in self._training and status.state in _NOTIFIED]
        # Check a lost run again: its runner may still be alive, and about to record how the run ended.
        active_or_lost = {
            run.id for run, status in statuses if status.state in ACTIVE or status.state == "lost"
        }
        self._training = active_or_lost & (self._training | {r.id for r, s in statuses if s.state in ACTIVE})
        return tuple(news for news in map(notification_for, ended) if news is not None)

    def close(self) -> None:
        """Release the GPU driver."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _read_gpu(self) -> GpuMetrics | None:
        if self._no_gpu is not None and time.monotonic() < self._retry_at:
            return None
        try:
            if self._choice is None:
                self._choice = choose_gpu()
                self._gpu_problem = torch_problem(self._choice.gpu)
                if self._choice.why:
                    self._other_gpus = tuple(gpu for gpu in visible_gpus() if gpu != self._choice.gpu)
            if self._driver is None:
                self._driver = Nvml()
            metrics = self._driver.read(self._choice.gpu.index)
        except GpuUnavailableError as problem:
            self.close()
            self._no_gpu = problem
            self._retry_at = time.monotonic() + _RETRY_S
            return None
        self._no_gpu = None
        return metrics

    def _read_other(self, gpu: GpuDevice) -> GpuMetrics | None:
        """Return a reading of a GPU that is not the chosen one; None if the GPU does not respond."""
        with suppress(GpuUnavailableError):
            return None if self._driver is None else self._driver.read(gpu.index)
        return None

    def _has_free_gpu(self) -> bool:
        """Return whether runs are allowed to use several GPUs, and at least one of these GPUs has no run."""
        if self._choice is None or not self._other_gpus:
            return False
        return any(is_free(RunDevice.of_gpu(gpu).key) for gpu in (self._choice.gpu, *self._other_gpus))

    def _all_runs(self) -> list[RunDir]:
        seen_at = paths.runs_dir().stat().st_mtime_ns
        if seen_at != self._runs_seen_at:
            self._runs, self._runs_seen_at = all_runs(), seen_at
        return self._runs

    def _status(self, run: RunDir, *, is_queued: bool) -> Status:
        try:
            # Replacing a file in a folder updates the folder's modification time.
            written_at = run.path.stat().st_mtime_ns
        except OSError:
            written_at = -1
        known = self._statuses.get(run.id)
        # An active run can become lost, and a queued run can be removed from the queue, without a change to
        # the run's status file.
        stale = known is None or known[0] != written_at or (known[1].state == "queued") != is_queued
        if known is None or stale or known[1].state in ACTIVE:
            known = (written_at, read_status(run))
            self._statuses[run.id] = known
        return known[1]
