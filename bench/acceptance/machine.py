"""``python -m bench.acceptance.machine FILE.json``: describes GPU, driver and versions.

A separate process, because torch holds GPU memory once it has looked at a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_tui.gpu.driver import open_driver
from qlora_tui.gpu.errors import GpuUnavailableError

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
_OPTIONAL_PACKAGES = ("triton", "liger-kernel", "trl", "unsloth")


def describe_machine() -> dict[str, Any]:
    """Return the facts; ``has_gpu`` says whether torch can use one."""
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in (*_PACKAGES, *_OPTIONAL_PACKAGES):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    # Triton compiles with it at run time.
    facts["c_compiler"] = bool(shutil.which("cc") or shutil.which("gcc"))
    facts["has_gpu"] = torch.cuda.is_available()
    if facts["has_gpu"]:
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name,
            "gpu_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        with suppress(GpuUnavailableError), open_driver() as driver:
            facts["driver"] = driver.list_gpus()[0].driver
    return facts


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(describe_machine()))
