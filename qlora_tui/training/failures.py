"""Turns an exception into the event that ends a run, and finds the OSError behind a failed write.

torch writes files in C++ and reports a failed write as an unexpected position; safetensors writes in Rust and
has the error number in its message. Both become the OSError that caused them. This module does not import
torch, because torch may be the cause of the failure.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from qlora_tui.errors import EXIT_DISK, EXIT_FAILURE, UserError, disk_problem
from qlora_tui.formatting import format_bytes
from qlora_tui.gpu.cuda_errors import ONEDNN_MEMORY, cuda_error, is_out_of_memory
from qlora_tui.memory import Estimate
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed, Phase
from qlora_tui.runs.memory_retry import describe_fix, last_phase
from qlora_tui.runs.outcomes import gpu_problem

_RUST = re.compile(r"\(os error (\d+)\)")


def disk_error(error: BaseException) -> OSError | None:
    """Return the OSError that caused an exception while saving; None if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        in_rust = _RUST.search(str(seen))
        if in_rust:
            return OSError(int(in_rust[1]), os.strerror(int(in_rust[1])))
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def true_disk_errors() -> Iterator[None]:
    """Raise failed writes of torch or safetensors in this context as an OSError with an error number."""
    try:
        yield
    except Exception as error:
        behind = disk_error(error)
        if behind is None or behind is error:
            raise
        raise behind from error


_CPU_ALLOCATION = re.compile(r"DefaultCPUAllocator: .* allocate (\d+) bytes")
_SIZE = r"([\d.]+ (?:bytes|[KMG]iB))"
_GPU_ALLOCATION = re.compile(rf"Tried to allocate {_SIZE}\. .* of {_SIZE} of which {_SIZE} is free\.")
"""torch's message on a GPU (``c10/cuda/CUDACachingAllocator.cpp``)."""
_OTHER_PROGRAM = re.compile(rf"Process \d+ has {_SIZE} memory in use\.")
_OWN_PROCESS = "this process has"
"""The part of the message about the trainer. It is missing in a container, where the trainer cannot tell its
own process from others.
"""
_UNIT_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def failure_event(
    error: BaseException, run: RunDir, recipe: Recipe | None, estimate: Estimate | None
) -> Failed:
    """Return the event for an exception. ``estimate`` names the largest items if memory ran out."""
    now = time.time()
    if is_out_of_memory(error):
        return _out_of_memory(error, last_phase(run), recipe, estimate, now)
    if isinstance(error, UserError):
        return Failed.from_problem(error, at=now, exit_code=error.exit_code)
    gpu = gpu_problem(run, cuda_error(error))
    if gpu is not None:
        return Failed.from_problem(gpu, at=now, exit_code=EXIT_FAILURE)
    on_disk = disk_error(error)
    problem = on_disk and disk_problem(on_disk, run.path)
    if problem:
        problem.fix = f"{problem.fix} `qlora-tui resume {run.id}` then continues from the last checkpoint."
        return Failed.from_problem(problem, at=now, exit_code=EXIT_DISK)
    return Failed(
        at=now,
        title="Unexpected error in the trainer",
        what=f"{type(error).__name__}: {str(error).strip() or 'no message'}",
        fix=f"Details are in the log: {run.log_path}",
        kind="bug",
        exit_code=1,
    )


def is_full_disk(error: BaseException) -> bool:
    """Return whether a write failed because disk space or quota is used up."""
    on_disk = disk_error(error)
    return on_disk is not None and on_disk.errno in (errno.ENOSPC, errno.EDQUOT)


def _out_of_memory(
    error: BaseException, phase: Phase | None, recipe: Recipe | None, estimate: Estimate | None, now: float
) -> Failed:
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    what, missing_bytes, others = _memory_message(message), 0, list[int]()
    if allocation := _GPU_ALLOCATION.search(message):
        requested, total, free = map(_bytes, allocation.groups())
        missing_bytes = max(0, requested - free)
        what = (
            f"The trainer requested {format_bytes(requested)}, and {format_bytes(free)} of the GPU's "
            f"{format_bytes(total)} was free."
        )
        others = [_bytes(size) for size in _OTHER_PROGRAM.findall(message) if _OWN_PROCESS in message]
    why = ""
    if estimate is not None:
        largest = sorted(estimate.items, key=lambda item: -item.bytes)[:3]
        why = (
            "The largest items of the estimate are "
            + ", ".join(f"{i.label.lower()} {i.bytes / 2**30:.2f} GiB" for i in largest)
            + "."
        )
    failed = Failed(
        at=now,
        title="Out of GPU memory" if "CUDA" in message else "Out of memory",
        what=what,
        why=why,
        fix=describe_fix(recipe, phase),
        kind="out_of_memory",
        exit_code=1,
        phase=phase,
        missing_bytes=missing_bytes,
        others_bytes=sum(others),
    )
    if not failed.others_held_enough:
        return failed
    subject, closed = ("Another program", "program") if len(others) == 1 else ("Other programs", "programs")
    return replace(
        failed,
        why=f"{subject} held {format_bytes(sum(others))} of the GPU's memory.",
        fix=f"Close the other {closed} and resume. {failed.fix}",
    )


def _bytes(size: str) -> int:
    """Return the bytes of a size in torch's notation, such as ``1.50 GiB``."""
    number, unit = size.split()
    return round(float(number) * _UNIT_BYTES[unit])


def _memory_message(message: str) -> str:
    """Return torch's message; on a CPU, where that is unreadable, how much memory was requested."""
    allocation = _CPU_ALLOCATION.search(message)
    if allocation:
        requested = format_bytes(int(allocation[1]))
        return f"The trainer requested {requested}, more than the machine had left."
    return "The machine is out of memory." if message in ("", *ONEDNN_MEMORY) else message
