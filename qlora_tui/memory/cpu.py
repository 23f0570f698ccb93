"""Properties of the CPU, from Linux, and of the installed libraries that compute on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qlora_tui.gpu.torch_env import torch_version
from qlora_tui.gpu.torch_on_gpu import installed_torch

_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
"""CPU flags; without one, bf16 matrix products are a hundred times slower than fp32 ones."""


@dataclass(frozen=True)
class Processor:
    """CPU properties that a run depends on."""

    name: str
    native_bfloat16: bool
    """Whether it multiplies bfloat16 in hardware; if not, the trainer computes in float32."""


def torch_is_for_cuda() -> bool:
    """Return whether the installed torch is a CUDA build. Does not import it."""
    torch = installed_torch()
    return torch is not None and torch.platform == "cuda"


@cache
def liger_is_installed() -> bool:
    """Return whether Liger's kernels and Triton, which they need, are installed. Imports neither."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


@cache
def triton_is_installed() -> bool:
    """Return whether Triton is installed. Does not import it."""
    return find_spec("triton") is not None


@cache
def torch_has_varlen() -> bool:
    """Return whether the installed torch has variable-length attention with windows. Does not import it."""
    return torch_version() >= (2, 11)


def this_processor() -> Processor:
    """Return the first processor of this machine."""
    name, native = "CPU", False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Processor(name, native)
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            native = not _BFLOAT16_FLAGS.isdisjoint(value.split())
            break
    return Processor(name, native)
