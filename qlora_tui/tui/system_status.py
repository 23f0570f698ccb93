"""The result of one poll of the machine."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_tui import paths
from qlora_tui.formatting import pluralize

if TYPE_CHECKING:
    from qlora_tui.errors import UserError
    from qlora_tui.gpu.errors import GpuUnavailableError
    from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
    from qlora_tui.runs.directory import RunDir
    from qlora_tui.runs.doctor import Machine
    from qlora_tui.runs.notify import RunNotification
    from qlora_tui.runs.servers import ServerStatus
    from qlora_tui.runs.status import Status


@dataclass(frozen=True)
class RunningExport:
    """An export that another process is writing."""

    run: str
    """Name of the run whose adapter is being exported."""
    form: str
    """What is being written: ``Q8_0``, ``merged model``."""


@dataclass(frozen=True)
class Host:
    """Memory and disk of the machine on which runs train."""

    memory_bytes: int
    available_bytes: int
    disk_free_bytes: int | None
    """Free space on the disk that stores the runs; None if unknown."""


def read_host() -> Host:
    """Return the current memory and disk space of this machine."""
    import psutil  # not needed for the first frame

    memory = psutil.virtual_memory()
    try:
        disk = shutil.disk_usage(paths.runs_dir()).free
    except OSError:
        disk = None
    return Host(memory.total, memory.available, disk)


@dataclass(frozen=True)
class SystemStatus:
    """State of the machine's GPU, runs, exports and servers, as of one poll."""

    is_known: bool = False
    """False before the first poll; no other field is meaningful until then."""
    gpu: GpuDevice | None = None
    gpu_metrics: GpuMetrics | None = None
    other_gpus: tuple[GpuDevice, ...] = ()
    """GPUs that runs are allowed to use, in addition to :attr:`gpu`."""
    other_gpu_metrics: tuple[GpuMetrics | None, ...] = ()
    """A reading of each GPU in :attr:`other_gpus`; None for a GPU that does not respond."""
    gpu_choice: str = ""
    """Why :attr:`gpu` was selected among several GPUs; empty if there is only one GPU."""
    no_gpu: GpuUnavailableError | None = None
    """Why there is no GPU, or why the GPU does not respond; None if the GPU responds."""
    gpu_problem: UserError | None = None
    """Why torch cannot use the GPU; None if torch can use the GPU."""
    active: RunDir | None = None
    """The run that is training; None if no run is training. If several runs are training, on several GPUs,
    this is the newest.
    """
    active_status: Status | None = None
    also_active: tuple[RunDir, ...] = ()
    """The runs that are training, other than :attr:`active`."""
    also_active_statuses: tuple[Status, ...] = ()
    """The status of each run in :attr:`also_active`."""
    has_free_device: bool = False
    """Whether any device is free among those that a run may use."""
    active_or_last: RunDir | None = None
    """The active run, or else the run that ended last."""
    active_or_last_status: Status | None = None
    waiting_ids: tuple[str, ...] = ()
    """Ids of the runs in the queue, in the order in which they will start."""
    exports: tuple[RunningExport, ...] = ()
    """All exports that are being written, regardless of the run."""
    servers: tuple[ServerStatus, ...] = ()
    """Running servers, through which other programs use adapters."""
    ended_runs: tuple[RunNotification, ...] = ()
    """Notifications about runs that have ended since the last poll."""
    host: Host | None = None
    """Memory and disk of the machine; None before the first poll."""
    box: str = ""
    """Name of the other machine that this status describes; empty for this machine."""
    box_silent_s: float = 0.0
    """Seconds since the machine :attr:`box` last responded; 0 if it responds."""
    box_note: str = ""
    """What the machine :attr:`box` is doing, such as receiving data, or why it cannot be reached."""

    @property
    def loaded_server(self) -> ServerStatus | None:
        """The first server that holds a model in memory; None if there is none."""
        return next((server for server in self.servers if server.memory_bytes), None)

    def continues_without_app(self, watched: RunDir | None = None) -> list[str]:
        """Return a line for each run, export and server that continues after the app exits, followed by the
        command that opens the app again. Return an empty list if nothing continues.

        Args:
            watched: The run that the Train screen shows; its line comes first, unless it has ended. None if
                no screen shows a run.
        """
        from qlora_tui.runs.status import ACTIVE, read_status  # not needed for the first frame

        lines = []
        watched_or_active = (watched, self.active, *self.also_active)
        runs = dict.fromkeys(run for run in watched_or_active if run and read_status(run).state in ACTIVE)
        lines += [f"{run.id} continues." for run in runs]
        program = f"qlora-tui --host {shlex.quote(self.box)}" if self.box else "qlora-tui"
        back = f"{program} attach {shlex.quote(next(iter(runs)).id)}" if runs else program
        if self.waiting_ids:
            verb = "waits" if len(self.waiting_ids) == 1 else "wait"
            lines.append(f"{pluralize(len(self.waiting_ids), 'run')} {verb} in the queue.")
        lines += [f"The export of {each.run} ({each.form}) continues." for each in self.exports]
        lines += [f"The server on port {server.port} continues." for server in self.servers]
        return [*lines, f"Come back: {back}"] if lines else []

    @property
    def machine(self) -> Machine:
        """The machine that a run would start on, regardless of which GPU the estimates assume."""
        from qlora_tui.memory.budget import budget_for
        from qlora_tui.runs.doctor import Machine  # imported here because startup does not need the checks

        return Machine(
            budget=budget_for(self.gpu),
            gpu=self.gpu,
            used_bytes=self.gpu_metrics.memory_used_bytes if self.gpu_metrics else None,
            gpu_choice=self.gpu_choice,
            no_gpu=self.no_gpu,
            gpu_problem=self.gpu_problem,
            active=self.active.id if self.active else "",
            waiting=self.waiting_ids,
        )

    @property
    def trains_on(self) -> Literal["cpu", "unknown", "none"]:
        """What a run would train on while the driver reports no GPU: ``cpu``, ``unknown`` or, if no run can
        train, ``none``.
        """
        return "cpu" if self.no_gpu is None else self.no_gpu.reason.device

    @property
    def no_gpu_title(self) -> str:
        """Text to show in place of a GPU's name if the driver reports no GPU."""
        return {"cpu": "no GPU", "unknown": "unknown GPU", "none": "no usable GPU"}[self.trains_on]

    @property
    def no_gpu_reason(self) -> str:
        """Why there is no GPU, as a sentence; empty if there is a GPU."""
        return self.no_gpu.what if self.no_gpu else ""

    @property
    def free_bytes(self) -> int | None:
        """Bytes of the GPU's usable memory that are free; None without a GPU, or if unknown."""
        used = self.gpu_metrics.memory_used_bytes if self.gpu_metrics else None
        return self.usable_bytes - used if self.usable_bytes is not None and used is not None else None

    @property
    def usable_bytes(self) -> int | None:
        """Bytes of the GPU's memory that programs can use; None if unknown."""
        return self.gpu.usable_bytes if self.gpu else None
