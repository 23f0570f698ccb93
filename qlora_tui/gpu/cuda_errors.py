"""CUDA errors that are not bugs of a program: their meaning, and what the user can do about them.

CUDA identifies an error by a code and by a sentence, which has not changed between CUDA versions. torch
reports the code since 2.8 (``torch.AcceleratorError``); older versions, Triton and bitsandbytes report the
sentence.
"""

from __future__ import annotations

import os
import re
import time
from enum import Enum
from typing import NamedTuple

from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError, error_texts
from qlora_tui.gpu.torch_env import is_wsl2, without_growing_segments
from qlora_tui.gpu.torch_on_gpu import install_fix
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.installation import install_command

_MEMORY = 2
"""Code of ``cudaErrorMemoryAllocation``."""
_SENTENCE = re.compile(r"(?:CUDA (?:driver )?error|Triton Error \[CUDA\]|Error \d+): (.+)")
_BITSANDBYTES = re.compile(r"Error (.+) at line \d+ in file \S.*")
"""Pattern of bitsandbytes' output before it calls ``exit(1)`` (``csrc/compat.cuh``, ``BNB_CHECK_RETURN``)."""
_TERMINATED = re.compile(r"\s*what\(\):\s+CUDA (?:driver )?error: (.+)")
"""Pattern of the C++ runtime's output before it aborts the process, because a CUDA error was thrown while
another one was handled.
"""
_SUSPENSION_S = 1.0
"""The machine counts as suspended if the difference between the kernel's two clocks has grown by more than
this, in seconds.
"""
_MEMORY_WORDS = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)
ONEDNN_MEMORY = ("could not create a primitive", "could not create a memory object")
"""oneDNN's complete messages when memory runs out. Longer messages that contain one of these have another
meaning.
"""


class CudaFailure(Enum):
    """Kinds of errors that the user can do something about."""

    NO_CODE = "no code"
    DRIVER = "driver"
    BUSY = "busy"
    NOT_READY = "not ready"
    LIBRARY = "library"
    LOST = "lost"
    UNKNOWN = "unknown"
    """The GPU is lost; or, under WSL2, the Windows driver failed."""


_FAILURES = {
    3: (CudaFailure.DRIVER, "initialization error"),
    34: (CudaFailure.DRIVER, "CUDA driver is a stub library"),
    35: (CudaFailure.DRIVER, "CUDA driver version is insufficient for CUDA runtime version"),
    36: (CudaFailure.DRIVER, "API call is not supported in the installed CUDA driver"),
    46: (CudaFailure.BUSY, "CUDA-capable device(s) is/are busy or unavailable"),
    98: (CudaFailure.NO_CODE, "invalid device function"),
    100: (CudaFailure.DRIVER, "no CUDA-capable device is detected"),
    200: (CudaFailure.NO_CODE, "device kernel image is invalid"),
    209: (CudaFailure.NO_CODE, "no kernel image is available for execution on the device"),
    214: (CudaFailure.LOST, "uncorrectable ECC error encountered"),
    216: (CudaFailure.BUSY, "exclusive-thread device already in use by a different thread"),
    218: (CudaFailure.NO_CODE, "a PTX JIT compilation failed"),
    220: (CudaFailure.LOST, "uncorrectable NVLink error detected during the execution"),
    222: (CudaFailure.DRIVER, "the provided PTX was compiled with an unsupported toolchain."),
    223: (CudaFailure.NO_CODE, "PTX JIT compilation was disabled"),
    600: (CudaFailure.UNKNOWN, "device not ready"),
    702: (CudaFailure.LOST, "the launch timed out and was terminated"),
    719: (CudaFailure.LOST, "unspecified launch failure"),
    802: (CudaFailure.NOT_READY, "system not yet initialized"),
    803: (CudaFailure.DRIVER, "system has unsupported display driver / cuda driver combination"),
    804: (CudaFailure.DRIVER, "forward compatibility was attempted on non supported HW"),
    999: (CudaFailure.UNKNOWN, "unknown error"),
}
"""Kind and sentence of each code, ``cudaError_t`` in ``driver_types.h``.

Wrong addresses and assertions are left out, because they are bugs.
"""
_WITHOUT_CODE = (
    (CudaFailure.BUSY, "all CUDA-capable devices are busy or unavailable"),
    (CudaFailure.LIBRARY, "CUBLAS_STATUS_NOT_INITIALIZED"),
)
"""Kind and sentence of errors that ``_FAILURES`` lacks: the sentence of code 46 before CUDA 12, and an error
of cuBLAS.
"""


class CudaError(NamedTuple):
    """A CUDA error that the user can do something about."""

    failure: CudaFailure
    sentence: str
    """CUDA's own sentence."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the GPU or the machine ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def says_out_of_memory(message: str) -> bool:
    """Return whether a library's message means that the GPU or the machine ran out of memory."""
    return any(word in message for word in _MEMORY_WORDS) or message.strip() in ONEDNN_MEMORY


def cuda_error(error: BaseException) -> CudaError | None:
    """Return the CUDA error in an exception; None if there is none, or if it is a bug in this program."""
    code = getattr(error, "error_code", None)
    if isinstance(code, int) and code in _FAILURES:
        return CudaError(*_FAILURES[code])
    match = _SENTENCE.search(str(error))
    return _by_sentence(match[1]) if match else None


def breaks_process(error: BaseException) -> bool:
    """Return whether every later CUDA call in this process fails, as after an error of a kernel."""
    if getattr(error, "error_code", _MEMORY) != _MEMORY:
        return True
    match = _SENTENCE.search(str(error))
    return match is not None and not says_out_of_memory(match[1])


def sentence_in_log(line: str) -> str:
    """Return CUDA's sentence in a line that a library wrote before it ended the process; otherwise empty."""
    match = _BITSANDBYTES.fullmatch(line) or _TERMINATED.fullmatch(line)
    return match[1] if match else ""


def error_in_log(line: str) -> CudaError | None:
    """Return the error in a line that a library wrote before it ended the process; None if there is none."""
    return _by_sentence(sentence_in_log(line))


def describe(error: CudaError) -> UserError:
    """Return the error to show for a CUDA error, without advice on how to continue a run."""
    in_windows = error.failure is CudaFailure.UNKNOWN and is_wsl2()
    kind = CudaFailure.LOST if error.failure is CudaFailure.UNKNOWN else error.failure
    text = error_texts().windows_driver if in_windows else error_texts().cuda[kind.value]
    why = f'CUDA says: "{error.sentence}". {text.why}'
    may_be_suspension = error.failure in (CudaFailure.LOST, CudaFailure.UNKNOWN, CudaFailure.DRIVER)
    if may_be_suspension and _suspended_s() - _suspended_before_s > _SUSPENSION_S:
        what = (
            "The machine was suspended while the GPU computed, and the contents of the GPU's memory were "
            "lost."
        )
        return UserError(text.title, what=what, why=f'CUDA says: "{error.sentence}".', fix=text.fix)
    fix = text.fix
    if in_windows and (setting := without_growing_segments(os.environ)):
        fix = (
            f"Set `{setting}`: expandable segments fail on some versions of this driver. If that does not "
            f"help: {fix}"
        )
    if error.failure is CudaFailure.NO_CODE:
        try:
            gpu = default_cuda_device()
        except GpuUnavailableError:
            gpu = None
        fix = fix.format(torch=install_fix(gpu), bitsandbytes=install_command("bitsandbytes"))
    return UserError(text.title, what=text.what, why=why, fix=fix)


def cuda_problem(error: BaseException) -> UserError | None:
    """Return the error to show for an exception of CUDA; None if it is a bug, or not from CUDA."""
    reported = cuda_error(error)
    return None if reported is None else describe(reported)


def _by_sentence(sentence: str) -> CudaError | None:
    matches = (known for known in (*_FAILURES.values(), *_WITHOUT_CODE) if sentence.startswith(known[1]))
    return next((CudaError(*known) for known in matches), None)


def _suspended_s() -> float:
    """Return how long the machine was suspended, in seconds: the difference between a clock that counts
    suspensions and a clock that does not.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock) - time.monotonic()


_suspended_before_s = _suspended_s()
