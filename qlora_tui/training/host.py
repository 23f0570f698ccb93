"""Lowers the trainer's CPU priority, and returns free memory to the operating system and the GPU."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path


def release_free_memory() -> None:
    """Return the free pages of every arena to the system. Does nothing if the C library is not glibc.

    glibc itself returns only pages at the top of the heap. Reading a tokenizer of 262,144 tokens leaves 260
    MiB of free pages below the top, which a step's tensors do not fill.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_gpu_memory() -> None:
    """Free tensors in reference cycles, and return the free memory of torch's pool to the GPU.

    Call this function once a model is no longer used. After the failure of a computation, call it outside the
    exception handler: inside, the traceback still holds the tensors of every frame.
    """
    # Imported here, because this module is loaded before torch.
    import torch

    gc.collect()
    torch.cuda.empty_cache()


_NICENESS = 10
_SESSION = Path("/proc/self/autogroup")


def lower_priority() -> None:
    """Let other programs run first; a trainer that is alone on the machine loses nothing.

    Linux divides the CPU among sessions before it considers niceness within one (sched(7), "autogroup"). So
    the session gets the niceness too, if this process leads it. Threads that already exist, such as the
    heartbeat, keep their priority.
    """
    os.nice(max(0, _NICENESS - os.nice(0)))
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            _SESSION.write_text(f"{_NICENESS}\n")
