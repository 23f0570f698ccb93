"""The devices of runs: which GPUs a run may use, which of them are free, and which ones it has.

Each device has a lock, which is a file in ``devices/`` of the state folder. The runner locks the devices of a
run, and the trainer inherits the locks. A device is free again when both have ended, however they end.
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
"""Key of the GPU that torch selects, if the driver does not list the GPUs."""
_TEST_PROCESSES = "QLORA_TUI_CPU_PROCESSES"
"""Tests use this variable to train in several processes on a CPU; nothing else sets it."""


class RunDevice(Struct, frozen=True, omit_defaults=True):
    """A device on which one run at a time computes."""

    key: str
    """UUID of a GPU, or its index if the driver reports no UUID.

    Otherwise :data:`CPU` or :data:`UNKNOWN_GPU`.
    """
    index: int | None = None
    """Number of the GPU in ``nvidia-smi``."""
    name: str = ""
    """Name of the GPU, such as ``RTX 4090``."""

    @classmethod
    def of_gpu(cls, gpu: GpuDevice) -> RunDevice:
        """Return the device of a GPU."""
        return cls(gpu.uuid or str(gpu.index), gpu.index, gpu.short_name)

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})" if self.index is not None else self.name


class Devices(Struct, frozen=True, omit_defaults=True):
    """The devices that a run has or may get."""

    devices: tuple[RunDevice, ...]
    processes: int = 1
    """Number of trainer processes, one for each GPU."""
    is_choice: bool = False
    """Whether the machine has several GPUs, so that the trainer must be told which to use."""

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the devices; the key of a GPU is its UUID."""
        return frozenset(device.key for device in self.devices)

    def to_arguments(self) -> list[str]:
        """Return the trainer option that names the GPUs; empty if the trainer finds them by itself."""
        return ["--gpu", ",".join(each.key for each in self.devices)] if self.is_choice else []

    def __str__(self) -> str:
        if len(self.devices) == 1:
            return str(self.devices[0])
        return f"GPUs {join_words([str(device.index) for device in self.devices])}"


_DECODER = msgspec.json.Decoder(Devices)


def devices_of(run: RunDir) -> Devices | None:
    """Return the devices of a run now or in its last attempt; None before its first attempt."""
    return read_json(run.devices_path, _DECODER)


def record_devices(run: RunDir, devices: Devices) -> None:
    """Record the devices of a run. Raises OSError."""
    atomic_write(run.devices_path, msgspec.json.encode(devices))


@dataclass(frozen=True)
class Wanted:
    """Requirement of a run: any ``count`` of these devices."""

    devices: tuple[RunDevice, ...]
    """The devices that the run may use, in order of preference."""
    gpus: tuple[GpuDevice, ...] = ()
    """The devices that are GPUs named by the driver."""
    count: int = 1
    processes: int = 1
    is_choice: bool = False

    def free(self, unavailable: Collection[str]) -> list[RunDevice]:
        """Return the devices that no key in ``unavailable`` can name."""
        return [each for each in self.devices if not any(_may_be(each.key, other) for other in unavailable)]

    def __str__(self) -> str:
        names = [str(device) for device in self.devices]
        if self.count == len(names):
            return join_words(names)
        return " or ".join(names) if self.count == 1 else f"{self.count} of {join_words(names)}"


def wanted_devices(
    recipe: Recipe, environ: Mapping[str, str], before: Devices | None = None, *, stays: bool = False
) -> Wanted:
    """Return the devices that a run may use, in order of preference.

    If the run does not need all of them, its earlier GPUs come first, followed by those with the most free
    memory.

    Args:
        recipe: Its ``training.gpus`` is the number of GPUs.
        environ: Environment variables, some of which select GPUs.
        before: Earlier devices of the run. If the recipe uses all GPUs, the run continues on as many GPUs as
            before.
        stays: Whether the run must continue on its earlier devices if they still exist, because other GPUs
            round differently.

    Raises:
        UserError: The machine has too few GPUs.
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


def own_device() -> RunDevice:
    """Return the device that torch selects in this process."""
    try:
        return RunDevice.of_gpu(default_cuda_device())
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
        fix=f"Set training.gpus to {there}, or to 0 for all of them." if there else "Set training.gpus to 1.",
    )


def _large_enough(recipe: Recipe, gpus: list[GpuDevice], count: int) -> list[GpuDevice]:
    """Return the GPUs with enough memory according to the estimate; all GPUs if too few have enough."""
    # The app's lists import this module, but only machines with several GPUs need the estimate.
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
    """Return the keys of the devices in use by runs; empty if the file system has no locks."""
    return {path.stem for path in _locks().glob("*.lock") if is_locked(path)}


def is_free(key: str) -> bool:
    """Return whether no run uses the device with this key; True if the file system has no locks."""
    return not any(_may_be(key, other) for other in taken_keys())


def _may_be(key: str, other: str) -> bool:
    """Return whether two keys may name the same device: a failing driver reports a GPU differently."""
    return key == other or (CPU not in (key, other) and _way_of_naming(key) != _way_of_naming(other))


def _way_of_naming(key: str) -> str:
    return "index" if key.isdecimal() else "unknown" if key == UNKNOWN_GPU else "uuid"


def run_on(key: str) -> str:
    """Return the id of the run that uses a device or is about to use it; empty if there is none.

    ``A run`` if the device is in use, but the run is unknown.
    """
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
    """Lock the devices for a run inside the block; yield None if another run has one of them.

    Otherwise yields descriptors for the trainer to inherit, which then holds the locks too. Raises UserError
    if the file system has no locks.
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
    """Choose devices for a run. If the run has to wait, return None and reserve the free devices it needs by
    adding them to ``unavailable``.

    Args:
        wanted: Requirement of the run.
        unavailable: Keys of devices that other runs use, or that are reserved for runs earlier in the queue.
            Without reservations, a run that needs several devices could wait forever while runs that need a
            single device overtake it.
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
