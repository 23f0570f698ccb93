"""Tells whether the installed torch can use a GPU, and if not, why and what to install instead.

Used before a launch, without importing torch, and in the processes that compute. On a machine with a GPU, a
run on the CPU takes weeks instead of hours. So if the GPU cannot be used, a run does not fall back to the
CPU; only the user can choose the CPU.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice, parse_version
from qlora_tui.gpu.visible_devices import choose_gpu
from qlora_tui.installation import torch_command, torch_command_needs

ON_THE_CPU = 'To train on the CPU, choose it: `--gpu cpu`, or gpu = "cpu" in config.toml.'
_TITLE = "torch cannot use the GPU"
_DRIVERS = {11: "450", 12: "525", 13: "580"}
"""First driver that runs every build for a major version of CUDA.

See CUDA Toolkit release notes, "CUDA minor version compatibility".
"""
_OLDEST_CAPABILITIES = {11: (3, 5), 12: (5, 0), 13: (7, 5)}
"""Lowest compute capability that each major version of CUDA compiles for."""
_TRIMMED_CUDA = (12, 8)
"""First CUDA for which PyTorch's own builds lack code for GPUs that this CUDA could still compile for.

The lowest compute capability of these builds is 7.5, and in torch 2.8 to 2.10 it is 7.0 (pytorch issues
157517 and 172352).
"""
_BUILDS = {
    "cu130": ((13, 0), ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120")),
    "cu126": ((12, 6), ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
    "cu128": ((12, 8), ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
}
"""CUDA and architectures of PyTorch's own builds, in order of preference.

Source: ``RELEASE.md`` of pytorch, "CUDA Support Matrix". Each build has its own package index
(https://download.pytorch.org/whl).
"""
_BLACKWELL = (10, 0)
_BLACKWELL_CUDA = (12, 8)
"""First CUDA that compiles for compute capability 10.0 and 12.0 (RTX 50)."""
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch."""

    version: str
    """Version with the build: ``2.13.0+cpu``."""
    platform: Literal["cuda", "rocm", "cpu", "unknown"]
    cuda: tuple[int, int] | None = None
    """The CUDA version of the build; None if the build is not for CUDA."""


@cache
def installed_torch() -> TorchBuild | None:
    """Return the installed torch without importing it; None if it is not installed."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        values = _constants(Path(spec.origin).with_name("version.py"))
        name = str(values.get("__version__") or version("torch"))
    except (OSError, SyntaxError, ValueError, PackageNotFoundError):
        return TorchBuild("", "unknown")
    if values.get("cuda"):
        return TorchBuild(name, "cuda", parse_version(str(values["cuda"])))
    if values.get("hip"):
        return TorchBuild(name, "rocm")
    return TorchBuild(name, "cpu" if "cuda" in values else "unknown")


def torch_problem(gpu: GpuDevice | None) -> UserError | None:
    """Return why the installed torch cannot use a GPU; None if no reason is known before torch is imported.

    Args:
        gpu: The GPU; None if it cannot be read.
    """
    torch = installed_torch()
    if torch is None or torch.platform == "unknown":
        return None
    if torch.cuda is None:
        built = "AMD GPUs" if torch.platform == "rocm" else "the CPU"
        return _problem(
            f"This machine has an NVIDIA GPU{f', {gpu.short_name}' if gpu else ''}, but the installed torch "
            f"{torch.version} is built for {built}.",
            "This torch cannot compute on the GPU, and the CPU is many times slower.",
            install_fix(gpu),
        )
    if gpu is None:
        return None
    driver_cuda, capability = parse_version(gpu.cuda_version), gpu.capability
    if driver_cuda is not None and driver_cuda[0] < torch.cuda[0]:
        needed = _DRIVERS.get(torch.cuda[0], "")
        return _problem(
            f"Driver {gpu.driver or ''} supports CUDA {gpu.cuda_version}, but the installed torch "
            f"{torch.version} is built with CUDA {_dotted(torch.cuda)}.",
            f"CUDA {torch.cuda[0]} needs a newer driver{f', {needed} or later' if needed else ''}.",
            f"Update the driver, or: {install_fix(gpu)}",
        )
    if capability is not None and (why := _why_not_compiled(capability, torch)):
        return _no_code(gpu.short_name, capability, why, driver_cuda or torch.cuda)
    if gpu.compute_mode == "prohibited":
        return UserError(
            "The GPU's compute mode allows no programs",
            what=f"{gpu.short_name} is in compute mode Prohibited.",
            why="The administrator does not allow programs to compute on it.",
            fix=f"Change the mode: `sudo nvidia-smi -i {gpu.index} -c DEFAULT`. {ON_THE_CPU}",
        )
    return None


def architecture_problem(
    name: str, capability: tuple[int, int], architectures: Sequence[str]
) -> UserError | None:
    """Return why torch has no code for a GPU that it sees; None if it has.

    Args:
        name: name of the GPU.
        capability: its compute capability.
        architectures: result of ``torch.cuda.get_arch_list()``; empty if unknown.
    """
    if not architectures or any(_runs_on(architecture, capability) for architecture in architectures):
        return None
    torch = installed_torch()
    # The driver supports at least the CUDA version of this torch.
    cuda = (torch and torch.cuda) or (12, 0)
    return _no_code(name, capability, f"This build of torch supports only {', '.join(architectures)}.", cuda)


def why_on_the_cpu() -> UserError | None:
    """Return why this process must not fall back to the CPU if torch sees no GPU; None if it is allowed to.

    Computing on the CPU is allowed if the machine has no GPU, or if the user chose the CPU.
    """
    try:
        gpu = choose_gpu().gpu
    except GpuUnavailableError as error:
        if error.reason.device == "cpu":
            return None
        if error.reason.device == "none":
            return with_cpu_choice(error)
        gpu = None
    torch = installed_torch()
    return torch_problem(gpu) or _problem(
        f"The driver reports a GPU{f' ({gpu.short_name})' if gpu else ''}, but the installed torch "
        f"{f'{torch.version} ' if torch else ''}finds no GPU.",
        "The driver was left broken by a suspend or an update, or a container has no access to the GPU.",
        "After a suspend: `sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm`; otherwise reboot.",
    )


def with_cpu_choice(error: GpuUnavailableError) -> UserError:
    """Return ``error`` with the added advice that the user can choose the CPU."""
    return error.replace(fix=f"{error.fix} {ON_THE_CPU}")


def install_fix(gpu: GpuDevice | None) -> str:
    """Return a sentence that says which torch to install for a GPU and its driver; None is an unknown GPU."""
    build = "" if gpu is None else _build_for(gpu.capability, parse_version(gpu.cuda_version))
    return _install_fix(build)


def _problem(what: str, why: str, fix: str) -> UserError:
    return UserError(_TITLE, what=what, why=why, fix=f"{fix} {ON_THE_CPU}")


def _no_code(name: str, capability: tuple[int, int], why: str, driver_cuda: tuple[int, int]) -> UserError:
    torch = installed_torch()
    return _problem(
        f"{name} has compute capability {_dotted(capability)}, for which the installed torch "
        f"{f'{torch.version} ' if torch else ''}has no code.",
        why,
        _install_fix(_build_for(capability, driver_cuda)),
    )


def _install_fix(build: str) -> str:
    torch = installed_torch()
    if build and torch and torch.cuda == _BUILDS[build][0]:
        return "PyTorch has no other build for this GPU and driver: see https://pytorch.org/get-started."
    if not build:
        return "Install a build of torch for this GPU and driver: https://pytorch.org/get-started."
    needs = f" ({needed})" if (needed := torch_command_needs()) else ""
    return f"Install the build of torch for this GPU and driver: `{torch_command(build)}`{needs}."


def _build_for(capability: tuple[int, int] | None, driver_cuda: tuple[int, int] | None) -> str:
    """Return the torch build, such as ``cu126``, that driver and GPU can run; empty if none is known."""
    if driver_cuda is None:
        return ""
    for build, (cuda, architectures) in _BUILDS.items():
        has_code = capability is None or any(_runs_on(each, capability) for each in architectures)
        if cuda[0] <= driver_cuda[0] and has_code:
            return build
    return ""


def _why_not_compiled(capability: tuple[int, int], torch: TorchBuild) -> str:
    """Return why a build for CUDA has no code for a compute capability; empty if no reason is known."""
    if torch.cuda is None:
        return ""
    oldest = _OLDEST_CAPABILITIES.get(torch.cuda[0])
    if oldest is not None and capability < oldest:
        return f"CUDA {torch.cuda[0]} compiles for compute capability {_dotted(oldest)} and newer."
    # Other builds may compile for any GPU; only PyTorch's own builds name CUDA in their version.
    is_pytorchs = torch.version.endswith(f"+cu{torch.cuda[0]}{torch.cuda[1]}")
    if is_pytorchs and torch.cuda >= _TRIMMED_CUDA:
        numbers = parse_version(torch.version)
        oldest = (7, 0) if numbers is not None and (2, 8) <= numbers < (2, 11) else (7, 5)
        if capability < oldest:
            cuda = _dotted(torch.cuda)
            return f"This build for CUDA {cuda} has code for compute capability {_dotted(oldest)} and newer."
    if capability >= _BLACKWELL and torch.cuda < _BLACKWELL_CUDA:
        return f"Compute capability {_dotted(capability)} needs a build with CUDA {_dotted(_BLACKWELL_CUDA)}."
    return ""


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture such as ``sm_86`` or ``compute_90`` runs on a GPU.

    Machine code (``sm``) runs on GPUs with the same major version and the same or a later minor version. Code
    with the suffix ``a`` runs only on its own version, and code with ``f`` only within its family. Other
    intermediate code (``compute``) is compiled for any later GPU (CUDA Programming Guide).
    """
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        return True
    kind, built_for, limit = match[1], (int(match[2]), int(match[3])), match[4]
    if limit == "a":
        return built_for == capability
    if kind == "sm" or limit == "f":
        return built_for[0] == capability[0] and built_for <= capability
    return built_for <= capability


def _constants(file: Path) -> dict[str, object]:
    """Return the constants that a Python file assigns at its top level."""
    values: dict[str, object] = {}
    for statement in ast.parse(file.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Constant):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            values |= {target.id: statement.value.value for target in targets if isinstance(target, ast.Name)}
    return values


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
