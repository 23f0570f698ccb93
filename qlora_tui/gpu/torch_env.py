"""Sets up a process before it imports torch, and makes the import faster.

The module sets environment variables and warning filters. It detects WSL2, where CUDA uses the GPU through
the Windows driver, and says what does not work there. :func:`faster_imports` is for torch, transformers, peft
and bitsandbytes.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import psutil

from qlora_tui import paths, worker
from qlora_tui.gpu.visible_devices import set_device_variables

_CPU_SAMPLE_S = 0.3
_IDLE_MAX_CORES = 0.5
"""CPU load, in cores, up to which the machine counts as idle."""
ONEDNN_CACHE_CAPACITY = 128
"""Number of primitives in the cache of oneDNN, which multiplies bfloat16 on a CPU.

oneDNN's default is 1,024 primitives of 0.3 MB each; a step uses about 70.
"""
FLASH_BEFORE_CUDNN = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1", "TORCH_CUDNN_SDPA_PREFERRED": "0"}
"""Variables that make torch prefer flash attention to cuDNN's.

On datacenter Hopper and Blackwell torch prefers cuDNN, which builds a plan for each new length. This takes
about a second for forward and backward, and in training almost every sample has a new length. torch 2.9 reads
the second variable, later versions the first (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``).
"""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Variables for offline mode, for processes whose model and data are on this machine."""
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_CUDA_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""The older name of ``PYTORCH_ALLOC_CONF``. torch reads it first (``c10/cuda/CUDAAllocatorConfig.h``)."""
_READS_ALLOCATOR = (2, 10)
"""First version of torch that reads ``PYTORCH_ALLOC_CONF`` for CUDA.

2.9 ignores ``expandable_segments`` in it (pytorch issue 183387), and earlier versions do not know the
variable.
"""
_NEWEST = (1000, 0)
"""Version that is assumed if torch is not installed."""
_GROWING_SEGMENTS = "expandable_segments:True"
"""Allocator setting that reduces the fragmentation caused by varying sample lengths."""
offline_variables_set: set[str] = set()
"""Variables of ``OFFLINE`` that this process has set because the user had not set them."""
_USER_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def configure_torch_env(extra: Mapping[str, str] = {}) -> None:
    """Set the environment variables that torch and its libraries read, unless the user has set them.

    From then on, Hugging Face libraries are offline.
    """
    kernels = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(ONEDNN_CACHE_CAPACITY), **FLASH_BEFORE_CUDNN}
    # These warnings are about facts that this program checks and reports itself.
    quiet = {"TRANSFORMERS_VERBOSITY": "error"}
    for name, value in {**openmp_wait_policy(os.environ), **kernels, **quiet, **extra}.items():
        os.environ.setdefault(name, value)
    set_device_variables()
    for name, value in OFFLINE.items():
        if name not in os.environ:
            os.environ[name] = value
            offline_variables_set.add(name)
    # Deprecation warnings are for the libraries' developers, not for users who train or chat.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _log_bitsandbytes_warnings()


def _log_bitsandbytes_warnings() -> None:
    """Send the warnings of bitsandbytes' CPU backend to the log instead of the terminal.

    On import bitsandbytes warns that an optional kernel from the Hub is missing; ``doctor`` reports this in a
    sentence.
    """
    # Imported here because commands that start without logging import this module.
    import logging

    class LogHandler(logging.FileHandler):
        """Writes to the log. If the log cannot be written, reports this once and continues."""

        def emit(self, record: logging.LogRecord) -> None:
            try:
                super().emit(record)
            except OSError as error:
                logger.handlers[:] = [logging.NullHandler()]
                reason = error.strerror or error
                print(
                    f"{self.baseFilename}: {reason}. Messages of libraries are not logged.", file=sys.stderr
                )

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.propagate = False
    if not logger.handlers:
        handler = LogHandler(paths.log_path(), delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def openmp_wait_policy(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables for how OpenMP threads wait, after measuring CPU load for 0.3 s.

    On a busy machine threads sleep, because spinning makes a step many times slower as soon as another
    process needs a core. On an idle machine they spin briefly first: two cores then train at 160 to 175
    tokens/s instead of 94 to 110, but at 30 instead of 88 if the machine becomes busy later. Empty if the
    user has set a wait policy or uses one thread.
    """
    if environ.get("OMP_NUM_THREADS") == "1" or any(name in environ for name in _USER_WAIT_VARIABLES):
        return {}
    busy_cores = psutil.cpu_percent(_CPU_SAMPLE_S) / 100 * (psutil.cpu_count() or 1)
    return {"GOMP_SPINCOUNT": "20000"} if busy_cores <= _IDLE_MAX_CORES else {"OMP_WAIT_POLICY": "PASSIVE"}


def online_environ() -> dict[str, str]:
    """Return the environment of a child process that may use the network, even if this process is offline."""
    inherited = worker.subprocess_env()
    return {name: value for name, value in inherited.items() if name not in offline_variables_set}


def allocator_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to a trainer's environment for torch's CUDA allocator; empty if none.

    They request growing segments, unless the user has set the allocator or this is WSL2. If the installed
    torch reads only the older name, that name is added too, with the user's value if there is one.
    """
    value = _allocator_settings(environ)
    if _CUDA_ALLOCATOR in environ or not value:
        return {}
    names = (_ALLOCATOR,) if torch_version() >= _READS_ALLOCATOR else (_ALLOCATOR, _CUDA_ALLOCATOR)
    return {name: value for name in names if name not in environ}


def grows_segments(environ: Mapping[str, str]) -> bool:
    """Return whether the CUDA allocator grows its segments in a trainer started with these variables."""
    settings = _allocator_settings(environ)
    values = dict(pair.split(":", 1) for pair in settings.replace(" ", "").split(",") if ":" in pair)
    return values.get("expandable_segments") == "True"


def without_growing_segments(environ: Mapping[str, str]) -> str:
    """Return a ``NAME=value`` that turns off the user's growing segments; empty if they are not set."""
    name = _CUDA_ALLOCATOR if _CUDA_ALLOCATOR in environ else _ALLOCATOR
    if name not in environ or not grows_segments(environ):
        return ""
    value = environ[name].replace(" ", "").replace(_GROWING_SEGMENTS, "expandable_segments:False")
    return f"{name}={value}"


def _allocator_settings(environ: Mapping[str, str]) -> str:
    """Return the settings of the allocator in a trainer started with these variables.

    They are the user's, or growing segments by default. WSL2 keeps torch's default, because mapping segments
    fails there on some drivers with "device not ready" or "unknown error" (pytorch issue 192330).
    """
    own = environ.get(_CUDA_ALLOCATOR, environ.get(_ALLOCATOR))
    return own if own is not None else "" if is_wsl2() else _GROWING_SEGMENTS


def torch_version() -> tuple[int, ...]:
    """Return major and minor version of the installed torch, without importing it.

    If torch is not installed, return a version newer than any release.
    """
    # Imported here because the app does not need it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        numbers = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return _NEWEST
    return tuple(int(number) for number in numbers)


_KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")
_GPU_OF_WINDOWS = Path("/dev/dxg")
"""The device of Linux's ``dxgkrnl`` driver. It also exists in WSL kernels whose version does not mention
Microsoft.
"""


def is_wsl2() -> bool:
    """Return whether this is Linux under Windows, including containers there.

    The release of its kernel is like ``5.15.153.1-microsoft-standard-WSL2``.
    """
    try:
        release = _KERNEL_RELEASE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        release = ""
    return "microsoft" in release.lower() or _GPU_OF_WINDOWS.exists()


def managed_memory_is_safe() -> bool:
    """Return whether the CPU may touch CUDA's managed memory while the GPU computes.

    Paged optimizers keep their states there. If ``concurrentManagedAccess`` is 0, as on WSL2, a CPU access to
    any managed memory before the GPU is synchronized is a segmentation fault (CUDA C++ Programming Guide,
    "Unified Memory on Windows or devices with compute capability 5.x"; CUDA on WSL User Guide, "Known
    Limitations for Linux CUDA Applications").
    """
    return not is_wsl2()


@contextmanager
def faster_imports() -> Iterator[None]:
    """Import libraries in the body of ``with`` without two kinds of unnecessary work.

    bitsandbytes passes four functions, none of which training on a GPU calls, to ``torch.compile`` when it is
    imported. This loads torch's compiler, TorchInductor, which takes over a second. Functions passed to
    ``torch.compile`` in the body are compiled at their first call instead.

    Garbage collections visit all modules loaded so far and free nothing. They are postponed to the end of the
    body, and then skip the loaded modules.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    import torch

    compile_now = torch.compile
    vars(torch)["compile"] = functools.partial(_compile_at_first_call, compile_now)
    try:
        yield
    finally:
        vars(torch)["compile"] = compile_now
        gc.freeze()
        if was_enabled:
            gc.enable()


def _compile_at_first_call(
    compile_now: Callable[..., Any], model: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Return the result of ``torch.compile`` for ``model``; a function is compiled at its first call."""
    if model is None:
        return functools.partial(_compile_at_first_call, compile_now, **options)
    if not isinstance(model, FunctionType):
        return compile_now(model, **options)  # type: ignore[no-any-return]

    compiled = functools.cache(lambda: compile_now(model, **options))

    @functools.wraps(model)
    def compile_and_call(*arguments: Any, **keywords: Any) -> Any:
        return compiled()(*arguments, **keywords)

    return compile_and_call
