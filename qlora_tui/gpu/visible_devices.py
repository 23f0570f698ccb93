"""Finds the GPU that torch will use, without importing torch.

If there are several GPUs, torch uses the one that the user names (``--gpu``, CUDA_VISIBLE_DEVICES, or ``gpu``
in ``config.toml``, in this order), or else the GPU with the most memory among those that are new enough. The
user can name several, separated by commas, for a run on all or one of them (:mod:`qlora_tui.runs.devices`).
Every process that loads torch must run with ``PCI_BUS_ORDER_ENV`` and :func:`device_variables` in its
environment: by default CUDA numbers the fastest GPU first, so its device 0 may differ from NVML's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.nvml import list_gpus
from qlora_tui.settings import GPU_VARIABLE, load_settings

PCI_BUS_ORDER_ENV = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Environment that makes CUDA number GPUs like NVML and ``nvidia-smi``."""

CPU = "cpu"
"""The choice of the CPU, which is also possible on a machine with a GPU."""
AUTO = "auto"
_VARIABLE = "CUDA_VISIBLE_DEVICES"
_LOCAL_RANK = "LOCAL_RANK"
"""Variable set by ``torchrun``: this process is one of several, and computes on the GPU of this number."""
_MIN_CAPABILITY = (7, 5)
"""Lowest compute capability that CUDA 13 and all kernels of this program support (RTX 20)."""
_variables_before: dict[str, str | None] = {}
"""Earlier values of the variables that this process set with :func:`set_device_variables`."""


@dataclass(frozen=True)
class GpuChoice:
    """The GPU that this process computes on: torch's ``cuda:0``, unless the run uses several GPUs."""

    gpu: GpuDevice
    why: str = ""
    """Why this GPU was chosen: ``GPU 1, the most memory of 2 GPUs``; empty if there is only one."""


def choose_gpu(environ: Mapping[str, str] = os.environ) -> GpuChoice:
    """Return the GPU that torch will use, and why. Raises ``GpuUnavailableError``."""
    choice, source = _requested(environ)
    if choice == CPU:
        raise GpuUnavailableError(GpuUnavailableReason.CPU_CHOSEN, f"{source} is {CPU}.")
    devices = _present(environ)
    usable = _usable(devices, environ)
    gpu = usable[min(int(environ.get(_LOCAL_RANK, 0)), len(usable) - 1)]
    if gpu.is_sliced:
        raise GpuUnavailableError(GpuUnavailableReason.MIG, f"{gpu.short_name} is divided into slices.")
    if len(devices) == 1:
        return GpuChoice(gpu)
    rule = source if source else f"the most memory of {pluralize(len(devices), 'GPU')}"
    return GpuChoice(gpu, f"GPU {gpu.index}, {rule}")


def default_cuda_device(environ: Mapping[str, str] = os.environ) -> GpuDevice:
    """Return the GPU that this process computes on. Raises ``GpuUnavailableError``."""
    return choose_gpu(environ).gpu


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[GpuDevice]:
    """Return the GPUs that a run may use, in torch's order. Raises ``GpuUnavailableError``."""
    choice, source = _requested(environ)
    if choice == CPU:
        raise GpuUnavailableError(GpuUnavailableReason.CPU_CHOSEN, f"{source} is {CPU}.")
    gpus = _usable(_present(environ), environ)
    if gpus[0].is_sliced:
        raise GpuUnavailableError(GpuUnavailableReason.MIG, f"{gpus[0].short_name} is divided into slices.")
    return gpus


def requested_gpus(environ: Mapping[str, str] = os.environ) -> str:
    """Return the user's choice of GPUs by ``--gpu`` or CUDA_VISIBLE_DEVICES, for a process that runs later.

    Returns:
        A choice in the form of ``--gpu``; empty if there is none, or if no GPU in CUDA_VISIBLE_DEVICES can be
        read.
    """
    if choice := environ.get(GPU_VARIABLE, ""):
        return choice
    environ = without_choice(environ)
    if _VARIABLE not in environ:
        return ""
    try:
        return ",".join(gpu.uuid or str(gpu.index) for gpu in visible_gpus(environ))
    except GpuUnavailableError:
        return ""


def device_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make torch use the chosen GPU, or the CPU; empty if none are needed."""
    choice, _ = _requested(environ)
    try:
        if choice == CPU:
            return {_VARIABLE: ""}
        if _VARIABLE in environ and not choice:
            return {}
        devices = _present(environ)
        gpus = _usable(devices, environ)
    except GpuUnavailableError:
        return {}
    if len(devices) == 1 or gpus[0].is_sliced:
        return {}
    # By UUID, because CUDA may number slices and lost GPUs differently.
    names = [gpu.uuid or str(gpu.index) for gpu in gpus]
    return {_VARIABLE: ",".join(names if _LOCAL_RANK in environ else names[:1])}


def set_device_variables() -> None:
    """Set :func:`device_variables` and the PCI bus order in this process, before it loads torch."""
    for name, value in PCI_BUS_ORDER_ENV.items():
        os.environ.setdefault(name, value)
    for name, value in device_variables(os.environ).items():
        _variables_before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def with_choice(gpu: str) -> dict[str, str]:
    """Return the variables of this process, with the GPUs that the user chose for a run, if any."""
    return dict(os.environ) | ({GPU_VARIABLE: gpu} if gpu else {})


def without_choice(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` as it was before this process chose a GPU, for a process that chooses its own."""
    before = {name: value for name, value in _variables_before.items() if value is not None}
    return {name: value for name, value in environ.items() if name not in _variables_before} | before


def release_choice() -> None:
    """Discard this process's choice of GPUs, because the processes that it starts make their own."""
    os.environ.pop(GPU_VARIABLE, None)
    if _VARIABLE in os.environ and requested_gpus({_VARIABLE: os.environ[_VARIABLE]}):
        del os.environ[_VARIABLE]


def cuda_device_order(
    devices: Sequence[GpuDevice], environ: Mapping[str, str] = os.environ
) -> list[GpuDevice]:
    """Return ``devices`` in the order of CUDA_VISIBLE_DEVICES, or of the PCI bus; empty if all are hidden.

    CUDA's rules (CUDA Programming Guide, "CUDA Environment Variables"): indices or UUIDs, which may be
    shortened while they stay unique; the list ends at the first entry that matches no GPU. As in
    ``torch/cuda/__init__.py``, a GPU named twice hides them all.
    """
    value = environ.get(_VARIABLE)
    if value is None:
        return list(devices)
    visible: list[GpuDevice] = []
    for entry in value.split(","):
        device = _match_entry(entry.strip(), devices)
        if device is None:
            break
        if device in visible:
            return []
        visible.append(device)
    return visible


def _requested(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the GPU that the user names and the source of the name.

    If CUDA_VISIBLE_DEVICES decides, the GPU is empty and the source is this variable.

    Raises:
        GpuUnavailableError: ``config.toml`` cannot be read.
    """
    option = _choice(environ.get(GPU_VARIABLE, ""))
    if option and option != AUTO:
        return option, "--gpu"
    if option or _VARIABLE in environ:
        return "", _VARIABLE if _VARIABLE in environ else ""
    try:
        setting = _choice(str(load_settings().gpu))
    except UserError as problem:
        raise GpuUnavailableError(GpuUnavailableReason.SETTING, problem.what) from problem
    return ("", "") if setting == AUTO else (setting, "gpu in config.toml")


def _choice(text: str) -> str:
    """Return a choice without surrounding space, with the words ``cpu`` and ``auto`` in lower case."""
    text = text.strip()
    return text.lower() if text.lower() in (CPU, AUTO) else text


def _present(environ: Mapping[str, str]) -> list[GpuDevice]:
    """Return the GPUs of the machine.

    Raises GpuUnavailableError. If the user chose a GPU and the machine has none, the reason is
    ``NOT_PRESENT``, so that no run uses the CPU instead.
    """
    try:
        return list_gpus()
    except GpuUnavailableError as error:
        choice, source = _requested(environ)
        if choice and error.reason.device == "cpu":
            why = f'{source} is "{choice}". {error.what}'
            raise GpuUnavailableError(GpuUnavailableReason.NOT_PRESENT, why) from error
        raise


def _usable(devices: Sequence[GpuDevice], environ: Mapping[str, str]) -> list[GpuDevice]:
    """Return the GPUs that torch should see, at least one, in the order in which they should be used.

    Raises:
        GpuUnavailableError: no GPU is visible, or the chosen one is not.
    """
    choice, source = _requested(environ)
    visible = cuda_device_order(devices, environ)
    if not visible:
        raise _none_visible(environ[_VARIABLE], devices)
    if choice:
        chosen: list[GpuDevice] = []
        for part in choice.split(","):
            matches = _matches(part.strip(), visible)
            if len(matches) != 1 or matches[0] in chosen:
                raise _not_present(source, choice, visible, matches)
            chosen += matches
        return chosen
    if _VARIABLE in environ:
        return visible  # in the order of the user's choice
    most_suitable = min(map(_suitability, visible))
    suitable = [gpu for gpu in visible if _suitability(gpu) == most_suitable]
    return sorted(suitable, key=lambda gpu: -(gpu.usable_bytes or 0))


def _suitability(gpu: GpuDevice) -> tuple[bool, bool]:
    """Return a sort key: whole GPUs before sliced ones, then new enough GPUs before older ones."""
    return gpu.is_sliced, gpu.capability is not None and gpu.capability < _MIN_CAPABILITY


def _none_visible(value: str, devices: Sequence[GpuDevice]) -> GpuUnavailableError:
    first = value.split(",")[0].strip()
    if first.startswith("MIG-"):
        return GpuUnavailableError(GpuUnavailableReason.MIG, f'{_VARIABLE} is set to "{value}".')
    if (first.isdecimal() or first.startswith("GPU-")) and _match_entry(first, devices) is None:
        return _not_present(_VARIABLE, value, devices)
    return GpuUnavailableError(GpuUnavailableReason.HIDDEN, f'{_VARIABLE} is set to "{value}".')


def _not_present(
    source: str, choice: str, devices: Sequence[GpuDevice], matches: Sequence[GpuDevice] = ()
) -> GpuUnavailableError:
    gpus = ", ".join(f"{gpu.index}: {gpu.short_name}" for gpu in matches or devices)
    matched = "several GPUs" if matches else "none of the GPUs"
    why = f'{source} is "{choice}", which matches {matched}: {gpus}.'
    return GpuUnavailableError(GpuUnavailableReason.NOT_PRESENT, why)


def _match_entry(entry: str, devices: Sequence[GpuDevice]) -> GpuDevice | None:
    if entry.startswith("GPU-"):
        matches = [gpu for gpu in devices if gpu.uuid is not None and gpu.uuid.startswith(entry)]
    else:
        matches = [gpu for gpu in devices if entry == str(gpu.index)]
    return matches[0] if len(matches) == 1 else None


def _matches(choice: str, devices: Sequence[GpuDevice]) -> list[GpuDevice]:
    """Return the GPUs that match the user's choice: an index, the start of a UUID, or part of a name."""
    by_index = _match_entry(choice, devices)
    if by_index is not None:
        return [by_index]
    text = choice.lower()
    return [gpu for gpu in devices if text in gpu.name.lower() or (gpu.uuid or "").lower().startswith(text)]
