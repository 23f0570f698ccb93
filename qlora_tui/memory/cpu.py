"""The CPU, as Linux tells of it, and the libraries that would compute here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
"""Without one of these a CPU multiplies bf16 matrices a hundred times slower than fp32 ones."""


@dataclass(frozen=True)
class Processor:
    """What a run on the CPU depends on."""

    name: str
    native_bfloat16: bool
    """It multiplies bfloat16 in hardware; the trainer computes in float32 where it does not."""


@cache
def torch_is_for_cuda() -> bool:
    """Whether the torch installed is a build for CUDA. Does not import it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


@cache
def liger_is_installed() -> bool:
    """Whether Liger's kernels, and the Triton they are written in, are there. Imports neither."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def this_processor() -> Processor:
    """The first of this machine."""
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
