"""The CPU, as Linux tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
"""Without one of these a CPU multiplies bf16 matrices a hundred times slower than fp32 ones."""


@dataclass(frozen=True)
class Processor:
    """What a run on the CPU depends on."""

    name: str
    native_bfloat16: bool
    """It multiplies bfloat16 in hardware; the trainer computes in float32 where it does not."""


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
