"""Checks of this machine: GPU, memory, disks, queue, locks and libraries.

``train`` and the Train screen run the checks that a recipe needs. ``doctor`` and a dialog of the app check
the machine without a recipe.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal

import psutil

from qlora_tui import paths, worker
from qlora_tui.catalog.local_models import hub_cache_dir
from qlora_tui.catalog.optional_kernels import describe_missing, types_by_kernel
from qlora_tui.errors import UserError, disk_problem
from qlora_tui.formatting import format_bytes, format_gib, format_path, join_words, uncapitalize
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice, GpuProcess
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.gpu.torch_on_gpu import torch_problem, with_cpu_choice
from qlora_tui.gpu.visible_devices import CPU, PCI_BUS_ORDER_ENV, choose_gpu, visible_gpus
from qlora_tui.hours import Clock
from qlora_tui.installation import PROGRAM, install_command
from qlora_tui.memory import Verdict
from qlora_tui.memory.budget import MemoryBudget, budget_for, this_processor
from qlora_tui.process_end import how_ended
from qlora_tui.publishing import new_draft
from qlora_tui.remote.calls import at_box
from qlora_tui.runs import run_queue
from qlora_tui.runs.devices import RunDevice, is_free
from qlora_tui.runs.directory import all_runs
from qlora_tui.runs.gate import closed_hours, is_own
from qlora_tui.runs.holds import hold_words
from qlora_tui.runs.process import INHIBITOR, threads_variable, torchrun_command
from qlora_tui.runs.servers import running_servers
from qlora_tui.runs.slurm_runs import is_on_cluster
from qlora_tui.runs.status import ACTIVE, read_status
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.settings import GPU_VARIABLE, current_settings, settings_problem
from qlora_tui.worker import error_file, last_lines, module_argv, run_job

Outcome = Literal["ok", "note", "warning", "error"]
_NOTABLE_BYTES = 512 << 20
"""A check warns if other programs use at least this much GPU memory, in bytes."""
_SPARE_HOST_BYTES = 1 << 30
"""Host memory that streamed layers must leave to other programs."""
_SELFTEST_S = 1800.0
_EXCHANGE = "GPU exchange"
_EXCHANGE_S = 90.0
"""Seconds after which an exchange between GPUs counts as hanging. Starting the processes takes up to half a
minute.
"""
_NO_P2P = "NCCL_P2P_DISABLE"
"""Environment variable that makes NCCL copy through host memory. Direct copies between consumer GPUs hang on
some machines.
"""
_NAMED_TYPES = 6
_CGROUP = Path("/proc/self/cgroup")
_BUS_S = 5.0
"""Seconds after which systemd counts as not responding."""
_DISK_BYTES = 5 * 2**30
"""Free space, in bytes, below which a check warns, because a model's download or a few checkpoints could fill
the disk.
"""


class CheckKind(Enum):
    """Subject of a check; the value is its name on screens and in JSON."""

    MODEL = "model"
    DATA = "data"
    SETTINGS = "settings"
    LORA = "LoRA"
    LENGTH = "length"
    TIME = "time"
    MEMORY = "memory"
    HOST_MEMORY = "host memory"
    GPU = "GPU"
    DISK = "disk"
    QUEUE = "queue"
    PYTHON = "Python"
    LOCKS = "file locks"
    SUSPENDING = "suspending"
    LOGOUT = "logging out"
    YIELDING = "yielding"
    LIBRARY = "library"
    KERNELS = "kernels"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    kind: CheckKind
    outcome: Outcome
    text: str
    """The result, in one or two sentences."""
    fix: str = ""
    """What the user can do about it."""
    problem: UserError | None = None
    """Set if the run cannot start at all. The user can override other errors."""
    suggested_fix: SuggestedFix | None = None
    """Changes to the recipe that resolve the problem. One key on the Train screen applies them."""
    name: str = ""
    """Name to display instead of the kind's name, such as ``disk for runs``, if there are several checks of
    one kind.
    """
    verdict: Verdict | None = None
    """Verdict on the run's memory, if that was checked."""

    @classmethod
    def blocked(cls, kind: CheckKind, problem: UserError, suggested_fix: SuggestedFix | None = None) -> Check:
        """Return a failed check for a ``problem`` that prevents the run."""
        return cls(kind, "error", problem.what, problem.fix, problem, suggested_fix)

    @property
    def label(self) -> str:
        """Name to display."""
        return self.name or self.kind.value


@dataclass(frozen=True)
class Machine:
    """Facts about this machine that the checks need, read once."""

    budget: MemoryBudget
    gpu: GpuDevice | None = None
    used_bytes: int | None = None
    """GPU memory in use; None if unknown."""
    gpu_choice: str = ""
    """Why this one of several GPUs was selected; empty if there is only one."""
    no_gpu: GpuUnavailableError | None = None
    """Why there is no GPU, or why ``gpu`` does not respond."""
    gpu_problem: UserError | None = None
    """Why torch cannot use ``gpu``."""
    active: str = ""
    """Id of the run in training; empty without one."""
    waiting: tuple[str, ...] = ()
    """Ids of the queued runs, the next one first."""

    @staticmethod
    def read_there() -> Machine:
        """Return the facts about the machine that this process runs on.

        A box calls this instead of receiving the ``Machine`` that the app passes to a function.
        """
        return read_machine()

    @property
    def device_name(self) -> str:
        """Name of the device, as recorded in the events of its runs; empty for an assumed GPU."""
        if self.budget.is_assumed:
            return ""
        return self.gpu.name if self.gpu else this_processor().name

    @property
    def trains_on_unknown_gpu(self) -> bool:
        """Whether a run would use a GPU whose memory neither the driver nor the user states."""
        unknown = self.no_gpu is not None and self.no_gpu.reason.device == "unknown"
        return unknown and not self.budget.is_assumed

    @property
    def free_bytes(self) -> int | None:
        """Free GPU memory in bytes; None if unknown."""
        usable = self.gpu.usable_bytes if self.gpu else None
        return None if usable is None or self.used_bytes is None else usable - self.used_bytes


def read_machine(assumed_bytes: int | None = None) -> Machine:
    """Query the driver, the runs and the queue.

    With ``assumed_bytes``, the memory budget is that of an assumed GPU of this size.
    """
    choice, used, unavailable = None, None, None
    try:
        choice = choose_gpu()
        with Nvml() as driver:
            used = driver.read(choice.gpu.index).memory_used_bytes
    except GpuUnavailableError as error:
        unavailable = error
    gpu = choice.gpu if choice else None
    here = (run for run in all_runs() if not is_on_cluster(run))
    active = next((run.id for run in here if read_status(run).state in ACTIVE), "")
    waiting = tuple(run_queue.waiting())
    return Machine(
        budget=budget_for(gpu, assumed_bytes),
        gpu=gpu,
        used_bytes=used,
        gpu_choice=choice.why if choice else "",
        no_gpu=unavailable,
        gpu_problem=torch_problem(gpu) if gpu else None,
        active=active,
        waiting=waiting,
    )


def check_gpu(machine: Machine, needed_bytes: int = 0) -> Check:
    """Check that torch can use the GPU, and that other programs leave ``needed_bytes`` of its memory free."""
    if machine.gpu_problem is not None:
        return Check.blocked(CheckKind.GPU, machine.gpu_problem)
    if machine.no_gpu is not None and machine.no_gpu.reason.device == "none":
        return Check.blocked(CheckKind.GPU, with_cpu_choice(machine.no_gpu))
    if machine.gpu is None:
        return _without_gpu(machine.no_gpu)
    gpu, free, used = machine.gpu, machine.free_bytes, machine.used_bytes
    name = f"{gpu.short_name} ({machine.gpu_choice})" if machine.gpu_choice else gpu.short_name
    if machine.active or (gpu.compute_mode != "exclusive" and (used is None or used < _NOTABLE_BYTES)):
        return Check(CheckKind.GPU, "ok", f"{name}, {format_gib(free)} GiB free.")
    # A server frees its memory when a run starts.
    guests = {server.engine_pid for server in running_servers()}
    held = _gpu_processes(gpu)
    processes = tuple(process for process in held if process.pid not in guests)
    given_up = sum(process.memory_bytes or 0 for process in held if process.pid in guests)
    free, used = None if free is None else free + given_up, None if used is None else used - given_up
    if gpu.compute_mode == "exclusive" and any(process.computes for process in processes):
        text = f"{name} is in exclusive mode, and in use by {_format_processes(processes)}."
        return Check(
            CheckKind.GPU,
            "error",
            text,
            "Close that program: in this mode only one program at a time may use the GPU.",
        )
    if used is None or used < _NOTABLE_BYTES:
        return Check(CheckKind.GPU, "ok", f"{name}, {format_gib(free)} GiB free.")
    text = f"{name}: {format_gib(used)} GiB in use by {_format_processes(processes)}."
    if free is not None and free < needed_bytes:
        fix = f"Close these programs: the run needs {format_gib(needed_bytes)} GiB."
        return Check(CheckKind.GPU, "error", text, fix)
    return Check(
        CheckKind.GPU, "warning", text, "Memory that they allocate later is not available to this run."
    )


def check_gpus(gpus: Sequence[GpuDevice]) -> Check:
    """Report the GPUs that a run on several GPUs uses, and the effects of differences between them."""
    names = join_words([str(RunDevice.of_gpu(gpu)) for gpu in gpus])
    if len({(gpu.name, gpu.usable_bytes) for gpu in gpus}) == 1:
        return Check(CheckKind.GPU, "ok", f"A run on several GPUs uses {names}.", name="GPUs")
    pace = "a run on several GPUs is as fast as the slowest, and its batch must fit the smallest"
    text = f"{names} differ: {pace}."
    return Check(CheckKind.GPU, "note", text, name="GPUs")


def check_exchange() -> list[Check]:
    """Report the GPUs, and check whether they can exchange gradients in a run on several GPUs.

    Empty with fewer than two GPUs. The exchange is not tested while a run uses one of them. Takes up to three
    minutes if the exchange hangs.
    """
    try:
        gpus = visible_gpus()
    except GpuUnavailableError:
        return []
    if len(gpus) == 1:
        return []
    checks = [check_gpus(gpus)]
    if busy := [str(device) for device in map(RunDevice.of_gpu, gpus) if not is_free(device.key)]:
        text = f"Not tested: a run uses {join_words(busy)}."
        return [*checks, Check(CheckKind.GPU, "note", text, name=_EXCHANGE)]
    rate, problem = _exchange(len(gpus))
    if rate is not None:
        text = f"{len(gpus)} GPUs sum gradients at {format_bytes(round(rate))} per second."
        return [*checks, Check(CheckKind.GPU, "ok", text, name=_EXCHANGE)]
    if _NO_P2P not in os.environ and _exchange(len(gpus), {_NO_P2P: "1"})[0] is not None:
        text = f"GPUs can exchange gradients only through host memory ({problem})."
        fix = f"Set {_NO_P2P}=1 before runs on several GPUs: `export {_NO_P2P}=1`."
        return [*checks, Check(CheckKind.GPU, "warning", text, fix, name=_EXCHANGE)]
    text = f"GPUs cannot exchange gradients: {problem}."
    fix = "Train on one GPU per run. `NCCL_DEBUG=INFO qlora-tui doctor` shows what NCCL tries."
    return [*checks, Check(CheckKind.GPU, "warning", text, fix, name=_EXCHANGE)]


def _exchange(processes: int, environ: Mapping[str, str] = {}) -> tuple[float | None, str]:
    """Return (bytes per second at which the processes reduce data, empty string), or (None, reason as a
    clause) if they cannot.
    """
    command = module_argv(*torchrun_command(processes, "qlora_tui.training.all_reduce"))
    variables = worker.subprocess_env() | PCI_BUS_ORDER_ENV | threads_variable(processes) | dict(environ)
    with error_file() as errors:
        child = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd="/"
        )
        try:
            output, _ = child.communicate(timeout=_EXCHANGE_S)
            return float(output.split()[-1]), ""
        except subprocess.TimeoutExpired:
            return None, f"no answer within {_EXCHANGE_S:.0f} seconds"
        except (ValueError, IndexError):
            return None, last_lines(errors, 1) or f"the process {how_ended(child.returncode)}"
        finally:
            # This also ends the processes that the child started.
            child.kill()
            child.communicate()


def _without_gpu(error: GpuUnavailableError | None) -> Check:
    """Return the GPU check if a run would train on the CPU, or if torch decides which device it uses."""
    if error is None:
        return Check(CheckKind.GPU, "warning", "No GPU: runs train on the CPU, slowly.")
    if error.reason.device == "unknown":
        problem = torch_problem(None)
        if problem is not None:
            return Check.blocked(CheckKind.GPU, problem)
        return Check(CheckKind.GPU, "warning", f"Unknown GPU: {error.what} {error.why}".rstrip(), error.fix)
    if error.reason is GpuUnavailableReason.CPU_CHOSEN:
        return Check(CheckKind.GPU, "note", f"Runs train on the CPU: {error.why}")
    return Check(CheckKind.GPU, "warning", f"No GPU: runs train on the CPU, slowly. {error.what}")


def _gpu_processes(gpu: GpuDevice) -> tuple[GpuProcess, ...]:
    try:
        with Nvml() as driver:
            return driver.read(gpu.index, processes=True).processes or ()
    except GpuUnavailableError:
        return ()


def _format_processes(processes: tuple[GpuProcess, ...]) -> str:
    return ", ".join(_format_process(process) for process in processes[:3]) or "other programs"


def _format_process(process: GpuProcess) -> str:
    try:
        name = psutil.Process(process.pid).name()
    except psutil.Error:
        name = "a process"
    return f"{name} ({process.pid})"


def check_host_memory(needed_bytes: int) -> Check:
    """Check that ``needed_bytes`` of streamed layers and offloaded inputs fit in free host memory."""
    problem = host_memory_problem(needed_bytes)
    if problem is not None:
        return Check(CheckKind.HOST_MEMORY, "error", problem.what, problem.fix)
    return Check(
        CheckKind.HOST_MEMORY, "ok", f"{format_gib(needed_bytes)} GiB for streamed layers and their inputs."
    )


def host_memory_problem(needed_bytes: int, limit_bytes: int | None = None) -> UserError | None:
    """Return the error if ``needed_bytes`` do not fit in free host memory; None if they fit.

    Args:
        needed_bytes: The whole base, which is loaded into host memory before its layers are streamed, plus
            the inputs of its layers if these are offloaded.
        limit_bytes: Memory limit of a container, which may be lower than the free memory.
    """
    free = int(psutil.virtual_memory().available)
    free = free if limit_bytes is None else min(free, limit_bytes)
    if needed_bytes + _SPARE_HOST_BYTES <= free:
        return None
    return UserError(
        "Host memory is too small",
        what=f"Streamed layers and offloaded inputs need {format_gib(needed_bytes)} GiB of host memory, but "
        f"only {format_gib(free)} GiB are free.",
        why="1 GiB is left free for other programs.",
        fix="Close other programs, choose a smaller model, lower Streamed layers "
        "(quantization.streamed_layers), or set Gradient checkpointing (training.gradient_checkpointing) to "
        "on.",
    )


def check_disk(folder: Path, needed_bytes: int, *, variable: str, name: str = "") -> Check:
    """Check that the disk of ``folder``, which may not exist yet, has ``needed_bytes`` free.

    ``variable`` is the environment variable that moves the folder to another disk.
    """
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    text = f"{format_bytes(free)} free in {format_path(folder)}."
    if free >= needed_bytes:
        return Check(CheckKind.DISK, "ok", text, name=name)
    fix = f"Free up space, or point {variable} at another disk: {format_bytes(needed_bytes)} may be needed."
    return Check(CheckKind.DISK, "error", text, fix, name=name)


def check_queue(machine: Machine) -> Check:
    """Report whether a run would start at once, or what it would wait for: other runs or the training hours.

    If the settings cannot be read, reports this problem instead.
    """
    ahead = [*filter(None, [machine.active]), *machine.waiting]
    if unreadable := check_settings():
        return replace(unreadable[0], kind=CheckKind.QUEUE)
    if not ahead and (hold := closed_hours(current_settings(), Clock())):
        fix = "`--now`, or `N` on the Train screen, starts it anyway."
        return Check(CheckKind.QUEUE, "note", f"The run waits {hold_words(hold)}.", fix)
    if not ahead:
        return Check(CheckKind.QUEUE, "ok", "No other run: this run starts at once.")
    more = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
    fix = "Change the order on the Runs screen." if machine.waiting else ""
    return Check(CheckKind.QUEUE, "note", f"The run waits for {ahead[0]}{more}.", fix)


def check_settings() -> list[Check]:
    """Check that ``config.toml`` can be read; empty if it can."""
    problem = settings_problem()
    if problem is None:
        return []
    text = (
        f"The settings for training hours and for yielding to other programs cannot be read. {problem.what}"
    )
    return [Check(CheckKind.SETTINGS, "warning", text, problem.fix)]


@at_box
def check_system() -> list[Check]:
    """Check Python, settings, disks, file locks, suspending, logging out, and GPU."""
    version = ".".join(map(str, sys.version_info[:3]))
    python = Check(CheckKind.PYTHON, "ok", f"{version}, {sys.executable}")
    machine = read_machine()
    gpu = [check_gpu(machine), *check_yielding(machine), *check_kernels(machine)]
    return [python, *check_settings(), *_disks(), check_locks(), check_suspending(), *check_logout(), *gpu]


def _disks() -> list[Check]:
    return [
        check_disk(folder, _DISK_BYTES, variable=variable, name=f"disk for {what}")
        for what, folder, variable in (
            ("runs", paths.state_dir(), "XDG_STATE_HOME"),
            ("downloaded models", hub_cache_dir(), "HF_HOME"),
            ("converted models and data", paths.cache_dir(), "XDG_CACHE_HOME"),
        )
    ]


def check_locks() -> Check:
    """Lock and release a file in the state folder, because the runner cannot work without locks."""
    try:
        with new_draft(paths.state_dir()):
            pass
    except (UserError, OSError) as error:
        problem = error if isinstance(error, UserError) else disk_problem(error)
        fix = problem.fix if problem else "Point XDG_STATE_HOME at another disk."
        return Check(CheckKind.LOCKS, "error", problem.what if problem else str(error), fix)
    return Check(CheckKind.LOCKS, "ok", f"work in {paths.state_dir()}")


def check_suspending() -> Check:
    """Check that systemd can keep the machine awake while a run trains."""
    if shutil.which(INHIBITOR) is not None:
        return Check(CheckKind.SUSPENDING, "ok", "systemd is asked not to suspend while a run trains")
    text = f"The machine may suspend while a run trains: there is no `{INHIBITOR}`."
    return Check(CheckKind.SUSPENDING, "note", text, "Turn off automatic suspend while runs train.")


def check_logout() -> list[Check]:
    """Check that logging out does not end runs.

    Empty if this process does not belong to a systemd session, or if systemd does not answer.
    """
    if not _CGROUP.exists() or "/session-" not in _CGROUP.read_text():
        return []
    manager = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
    answer = ""
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["busctl", "get-property", *manager, "KillUserProcesses", "KillExcludeUsers"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=_BUS_S, check=True).stdout
    kills, _, excluded = answer.partition("\n")
    if kills != "b true" or f'"{getpass.getuser()}"' in excluded:
        return [Check(CheckKind.LOGOUT, "ok", "runs continue after you log out")] if answer else []
    text = "systemd ends your runs when you log out (KillUserProcesses=yes in logind.conf)."
    fix = (
        "Run `loginctl enable-linger` once, and start the program with "
        f"`systemd-run --user --scope {PROGRAM}`."
    )
    return [Check(CheckKind.LOGOUT, "warning", text, fix)]


def check_yielding(machine: Machine) -> list[Check]:
    """Check that the driver lists the programs that a run would yield to.

    Empty if there is no GPU, or if runs do not yield according to the settings.
    """
    if machine.gpu is None or not current_settings().yields:
        return []
    with suppress(GpuUnavailableError), Nvml() as driver:
        listed = driver.busy_processes(machine.gpu.index)
        # Process ids of another namespace match no process here.
        if listed is not None and (not listed or any(is_own(each.pid) is not None for each in listed)):
            return [Check(CheckKind.YIELDING, "ok", "a run gives way to other programs on its GPU")]
    text = "Runs do not give way to other programs: the driver does not list their processes."
    fix = (
        "Pause the run yourself if another program needs the GPU. WSL2 and containers hide which programs "
        "use the GPU."
    )
    return [Check(CheckKind.YIELDING, "warning", text, fix)]


def check_kernels(machine: Machine) -> list[Check]:
    """Report which kernel packages are installed, and which models are slow without the missing ones.

    Empty without a GPU.
    """
    checks = []
    for package, types in types_by_kernel().items() if machine.gpu else ():
        name, models = package.distribution, ", ".join(types[:_NAMED_TYPES])
        more = f" and {len(types) - _NAMED_TYPES} more" if len(types) > _NAMED_TYPES else ""
        if package.is_installed:
            checks.append(Check(CheckKind.KERNELS, "ok", f"for {models}{more}", name=name))
        else:
            text, fix = describe_missing((package,))
            checks.append(
                Check(CheckKind.KERNELS, "note", f"{models}{more}: {uncapitalize(text)}", fix, name=name)
            )
    return checks


@at_box
def check_libraries(*, on_cpu: bool = False) -> list[Check]:
    """Import the libraries, then quantize, train and save a few weights, in a separate process.

    If this succeeds, :func:`check_exchange` follows. With ``on_cpu``, no GPU is used.
    """
    try:
        checks = run_job(
            "qlora_tui.training.selftest:check_training",
            result=list[Check],
            title="The self-test failed",
            subject="The self-test",
            fix=install_command(PROGRAM),
            deadline_s=_SELFTEST_S,
            environ=worker.subprocess_env() | ({GPU_VARIABLE: CPU} if on_cpu else {}),
        )
    except UserError as error:
        return [Check(CheckKind.LIBRARY, "error", f"{error.what} {error.why}".strip(), error.fix)]
    failed = any(check.outcome == "error" for check in checks)
    return checks if on_cpu or failed else [*checks, *check_exchange()]
