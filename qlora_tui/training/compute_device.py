"""The device, compute dtype and attention path of a run, and the versions of the libraries that it uses."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch

from qlora_tui.errors import UserError
from qlora_tui.gpu.torch_env import is_wsl2
from qlora_tui.gpu.torch_on_gpu import architecture_problem, why_on_the_cpu
from qlora_tui.memory.budget import this_processor
from qlora_tui.memory.execution import (
    BFLOAT16_CAPABILITY,
    AttentionPath,
    FlashObstacle,
    attention_path,
    flash_obstacle,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import packed_attention
from qlora_tui.training.fused.cpu_attention import token_multiple

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class ComputeDevice:
    """The device of a run."""

    torch_device: torch.device
    name: str
    """Name of the GPU, such as ``NVIDIA GeForce RTX 4090``, or of the CPU."""
    total_bytes: int
    dtype: torch.dtype
    """Dtype of activations, embeddings, norms and head."""

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        """Return ``cuda`` or ``cpu``, which is how events name the device."""
        return "cuda" if self.torch_device.type == "cuda" else "cpu"

    @property
    def row_multiple(self) -> int:
        """Sequences are padded to a multiple of this number of tokens."""
        return token_multiple(self.torch_device, self.dtype)

    @property
    def dtype_name(self) -> str:
        """Name of the compute dtype, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")


def find_device(recipe: Recipe, local_rank: int = 0) -> ComputeDevice:
    """Return the GPU of this process, or the CPU if there is none or the user chose it.

    Raises:
        UserError: the machine has a GPU that torch cannot use.
    """
    wanted = _DTYPES.get(recipe.quantization.compute_dtype)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(local_rank)
        capability = (properties.major, properties.minor)
        problem = architecture_problem(properties.name, capability, torch.cuda.get_arch_list())
        if problem is not None:
            raise problem
        if is_wsl2():
            _limit_memory(local_rank)
        # torch.cuda.is_bf16_supported() is not used, because it is also true for GPUs that only emulate
        # bfloat16.
        native_bfloat16 = capability >= BFLOAT16_CAPABILITY
        best = torch.bfloat16 if native_bfloat16 else torch.float16
        return ComputeDevice(
            torch_device=torch.device("cuda", local_rank),
            name=properties.name,
            total_bytes=properties.total_memory,
            dtype=wanted or best,
        )
    problem = why_on_the_cpu()
    if problem is not None:
        raise problem
    cpu = this_processor()
    best = torch.bfloat16 if cpu.native_bfloat16 else torch.float32
    return ComputeDevice(
        torch_device=torch.device("cpu"),
        name=cpu.name,
        total_bytes=host_memory_bytes(),
        dtype=wanted or best,
    )


def _limit_memory(index: int) -> None:
    """Limit torch to the GPU memory that is free, so that larger allocations fail.

    Otherwise the Windows driver would use system memory, which makes a step many times slower.
    """
    free, total = torch.cuda.mem_get_info(index)
    share = (free + torch.cuda.memory_reserved(index)) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), index)


def choose_attention(recipe: Recipe, device: ComputeDevice) -> AttentionPath:
    """Return the attention path to try first; ``model.prepare_base`` may fall back to the next path.

    Raises:
        UserError: flash is requested but not available.
    """
    obstacle = _flash_obstacle(device)
    if recipe.model.attention == "flash" and obstacle:
        raise UserError(
            "Flash attention is not available",
            what="model.attention is set to flash, which cannot run here.",
            why=why_no_flash(device),
            fix='Set model.attention to "auto", which selects an implementation that works here.',
        )
    return attention_path(recipe.model.attention, obstacle)


def why_no_flash(device: ComputeDevice) -> str:
    """Return why FlashAttention cannot run a packed sequence in one call; empty if it can."""
    reasons: dict[FlashObstacle | None, str] = {
        None: "",
        "no GPU": "Flash attention needs a CUDA GPU.",
        "float32": "Flash attention computes in 16 bits only.",
        "old GPU": f"Flash attention needs an Ampere GPU (RTX 30) or newer, but this is a {device.name}.",
        "old torch": f"Flash attention needs torch 2.11 or newer, but {torch.__version__} is installed.",
    }
    return reasons[_flash_obstacle(device)]


def _flash_obstacle(device: ComputeDevice) -> FlashObstacle | None:
    cuda = device.kind == "cuda"
    return flash_obstacle(
        cuda=cuda,
        compute_itemsize=device.dtype.itemsize,
        ampere=cuda and packed_attention.has_flash(device.torch_device),
        # Not checked without a GPU, because importing that module takes a fifth of a second.
        torch_has_varlen=cuda and packed_attention.find_kernel() is not None,
    )


def free_host_bytes() -> int:
    """Return the memory that is free on the machine, in bytes, but at most the container's limit."""
    return min(int(psutil.virtual_memory().available), host_memory_bytes())


def host_memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or the container's limit if that is lower."""
    total = int(psutil.virtual_memory().total)
    for path in _CGROUP_LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


_PACKAGES = ("qlora-tui", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def versions() -> dict[str, str]:
    """Return the versions of Python, of the libraries that a run computes with, and of torch's CUDA."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        installed["cuda"] = torch.version.cuda
    return installed
