"""The devices of runs: which GPUs a run may use, which of them are free, and which it has.

Each device has a lock, a file in ``devices/`` of the state folder. The runner takes those that a run needs,
and the trainer inherits them: a device is free again once both have ended, however they end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.decoding import read_json
from qlora_tui.errors import UsageError, UserError
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.formatting import join_words
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.nvml import Nvml, list_gpus
from qlora_tui.gpu.visible_devices import default_cuda_device, visible_gpus
from qlora_tui.locks import PATIENCE_S, is_locked, locked
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import ACTIVE, read_status

CPU = "cpu"
UNKNOWN_GPU = "gpu"
"""Key of the GPU that torch chooses, if the driver does not say which there are."""
_TEST_PROCESSES = "QLORA_TUI_CPU_PROCESSES"
"""Tests train in several processes on the processor with this variable; nothing else sets it."""


class RunDevice(Struct, frozen=True, omit_defaults=True):
    """A device that one run at a time computes on."""

    key: str
    """UUID of a GPU, :data:`CPU` or :data:`UNKNOWN_GPU`."""
    index: int | None = None
    """Number of the GPU in ``nvidia-smi``."""
    name: str = ""
    """``RTX 4090``."""

    @classmethod
    def of_gpu(cls, gpu: GpuDevice) -> RunDevice:
        """Return the device of a GPU."""
        return cls(gpu.uuid or str(gpu.index), gpu.index, gpu.short_name)

    @property
    def is_known_gpu(self) -> bool:
        """Whether it is a GPU that the driver names."""
        return self.index is not None

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})" if self.is_known_gpu else self.name


class Devices(Struct, frozen=True, omit_defaults=True):
    """The devices that a run has, or may have."""

    devices: tuple[RunDevice, ...]
    processes: int = 1
    """Processes of the trainer, one for each GPU."""
    is_choice: bool = False
    """Whether the machine has other GPUs, so that the trainer has to be told which to use."""

    @property
    def keys(self) -> frozenset[str]:
        """Return the keys of the devices; those of GPUs are their UUIDs."""
        return frozenset(device.key for device in self.devices)

    def to_arguments(self) -> list[str]:
        """Return the option of the trainer that names the GPUs; empty if it finds them by itself."""
        return ["--gpu", ",".join(each.key for each in self.devices)] if self.is_choice else []

    def __str__(self) -> str:
        if len(self.devices) == 1:
            return str(self.devices[0])
        return f"GPUs {join_words([str(device.index) for device in self.devices])}"


_DECODER = msgspec.json.Decoder(Devices)


def devices_of(run: RunDir) -> Devices | None:
    """Return the devices that a run has, or had last; None before its first attempt."""
    return read_json(run.devices_path, _DECODER)


def record_devices(run: RunDir, devices: Devices) -> None:
    """Write the devices that a run has. Raises OSError."""
    atomic_write(run.devices_path, msgspec.json.encode(devices))


@dataclass(frozen=True)
class Wanted:
    """What a run needs: any ``count`` of the devices."""

    devices: tuple[RunDevice, ...]
    """Those it may use, the one to take first."""
    gpus: tuple[GpuDevice, ...] = ()
    """The devices that are GPUs named by the driver."""
    count: int = 1
    processes: int = 1
    is_choice: bool = False

    def free(self, unavailable: Collection[str]) -> list[RunDevice]:
        """Return the devices whose keys are not in ``unavailable``."""
        return [each for each in self.devices if not any(_may_be(each.key, other) for other in unavailable)]

    def __str__(self) -> str:
        names = [str(device) for device in self.devices]
        if self.count == len(names):
            return join_words(names)
        return " or ".join(names) if self.count == 1 else f"{self.count} of {join_words(names)}"


def wanted_devices(
    recipe: Recipe, environ: Mapping[str, str], before: Devices | None = None, *, stays: bool = False
) -> Wanted:
    """Return what a run with this recipe needs: the GPUs that it had, then those with the most free memory.

    Args:
        recipe: its ``training.gpus`` says how many.
        environ: the variables with which a GPU is chosen.
        before: the devices of the run so far; it continues on as many if it is to use all GPUs.
        stays: continue on no others, as long as those are there: another GPU rounds in another way.

    Raises:
        UserError: fewer GPUs are there.
    """
    count = recipe.training.gpus or (before.processes if before is not None else 0)
    try:
        present, gpus = list_gpus(), visible_gpus(environ)
    except GpuUnavailableError as error:
        is_cpu = error.reason.device == "cpu"
        if count > 1 and not (is_cpu and os.environ.get(_TEST_PROCESSES)):
            raise _too_few(count, 0, f"{error.what} {error.why}".strip()) from error
        return Wanted((_unnamed(error),), processes=count or 1)
    if count > len(gpus):
        names = ", ".join(str(RunDevice.of_gpu(gpu)) for gpu in gpus)
        raise _too_few(count, len(gpus), f"A run may use {names}.")
    count = count or len(gpus)
    earlier = [gpu for gpu in gpus if before is not None and RunDevice.of_gpu(gpu).key in before.keys]
    if stays and len(earlier) == count:
        gpus = earlier
    if count < len(gpus):
        large = _large_enough(recipe, gpus, count)
        gpus = sorted(large, key=lambda gpu: (gpu not in earlier, -_free_bytes(gpu)))
    devices = tuple(map(RunDevice.of_gpu, gpus))
    return Wanted(devices, tuple(gpus), count, count, is_choice=len(present) > 1)


def own_device(environ: Mapping[str, str] = os.environ) -> RunDevice:
    """Return the device that torch chooses in a process with these variables."""
    try:
        return RunDevice.of_gpu(default_cuda_device(environ))
    except GpuUnavailableError as error:
        return _unnamed(error)


def _unnamed(error: GpuUnavailableError) -> RunDevice:
    is_cpu = error.reason.device == "cpu"
    return RunDevice(CPU, name="the CPU") if is_cpu else RunDevice(UNKNOWN_GPU, name="the GPU")


def _too_few(count: int, there: int, why: str) -> UsageError:
    return UsageError(
        "Not enough GPUs",
        what=f"The recipe asks for {count} GPUs (training.gpus), but only {there} can be used.",
        why=why,
        fix=f"Set training.gpus to {there}, or to all." if there else "Set training.gpus to 1.",
    )


def _large_enough(recipe: Recipe, gpus: list[GpuDevice], count: int) -> list[GpuDevice]:
    """Return the GPUs whose memory is enough as far as an estimate knows; all, if too few are."""
    # The app's lists import this module, and only a machine with several GPUs estimates.
    from qlora_tui.catalog.local_models import find_files
    from qlora_tui.memory import check_fit, estimate
    from qlora_tui.memory.budget import budget_for

    large = gpus
    with suppress(UserError):
        architecture = find_files(recipe.model.id).architecture
        budgets = {gpu.index: budget_for(gpu) for gpu in gpus}
        estimates = {
            index: estimate(recipe, architecture, device=budget.device) for index, budget in budgets.items()
        }
        large = [
            gpu
            for gpu in gpus
            if gpu.usable_bytes is None
            or check_fit(estimates[gpu.index], gpu.usable_bytes).word != "does not fit"
        ]
    return large if len(large) >= count else gpus


def _free_bytes(gpu: GpuDevice) -> int:
    used = None
    with suppress(GpuUnavailableError), Nvml() as driver:
        used = driver.read(gpu.index).memory_used_bytes
    return (gpu.usable_bytes or 0) - (used or 0)


def taken_keys() -> set[str]:
    """Return the keys of the devices that runs have; empty if the file system cannot tell."""
    return {path.stem for path in _locks().glob("*.lock") if is_locked(path)}


def is_free(key: str) -> bool:
    """Whether no run has the device with this key; also if the file system cannot tell."""
    return not any(_may_be(key, other) for other in taken_keys())


def _may_be(key: str, other: str) -> bool:
    """Whether two keys may be those of one device: the driver names a GPU in another way while it fails."""
    return key == other or (CPU not in (key, other) and _way_of_naming(key) != _way_of_naming(other))


def _way_of_naming(key: str) -> str:
    return "index" if key.isdecimal() else "unknown" if key == UNKNOWN_GPU else "uuid"


def run_on(key: str) -> str:
    """Return the id of the run that trains or is measured on a device, or is about to; empty if none is."""
    for lock in paths.runs_dir().glob("*/trainer.lock"):
        if is_locked(lock):
            devices = devices_of(RunDir(lock.parent))
            if devices is None or not devices.devices or key in devices.keys:
                return lock.parent.name
    if is_free(key):
        return ""
    starting = (run for run in all_runs() if read_status(run).state in ACTIVE)
    on_it = (run.id for run in starting if (devices := devices_of(run)) and key in devices.keys)
    return next(on_it, "A run")


@contextmanager
def claimed(devices: Devices) -> Iterator[tuple[int, ...] | None]:
    """Hold the devices for a run; yields None if another run has one of them.

    Yields descriptors for the trainer to inherit: it then holds them too.
    Raises UserError if the file system has no locks.
    """
    with ExitStack() as stack:
        handles = []
        for key in sorted(devices.keys):
            lock = stack.enter_context(locked(_lock_path(key), patience_s=PATIENCE_S))
            if lock is None:
                yield None
                return
            handles.append(lock.fileno())
        yield tuple(handles)


def choose(wanted: Wanted, unavailable: set[str]) -> Devices | None:
    """Return the devices for a run; None, and add those that are free to ``unavailable``, if it has to wait.

    Args:
        wanted: what the run needs.
        unavailable: keys of devices that other runs have, or that runs before it in the queue wait for: a run
            that needs several would otherwise wait as long as there are others that need one.
    """
    free = wanted.free(unavailable)
    if len(free) < wanted.count:
        unavailable.update(each.key for each in free)
        return None
    return Devices(tuple(free[: wanted.count]), wanted.processes, wanted.is_choice)


def _lock_path(key: str) -> Path:
    return private_dir(_locks()) / f"{key}.lock"


def _locks() -> Path:
    return paths.state_dir() / "devices"
