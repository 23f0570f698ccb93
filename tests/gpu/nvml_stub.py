"""Any card without a card: the real ``pynvml`` over a driver library built from ``nvml_stub.c``.

For tests of every folder:

``stub_env(scenario)``                what to add to the environment of a child process
``install_nvml_stub(patch, scenario)``  the same for this process and its children, while a test lasts

The scenarios are listed, with what they play, in ``nvml_stub.c``. Without a C compiler each of them skips the
test but ``no_driver``, which needs none.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

LIBRARY = "libnvidia-ml.so.1"
_SOURCE = Path(__file__).with_name("nvml_stub.c")


def build_stub(folder: Path) -> Path:
    """Compile the stub as ``folder/libnvidia-ml.so.1``; return its path. No compiler: skip the test."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build the NVML stub with")
    library = folder / LIBRARY
    flags = ["-std=c11", "-Wall", "-Wextra", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(_SOURCE)], check=True)
    return library


def stub_env(scenario: str, *, lost_after: int = 100) -> dict[str, str]:
    """Environment that makes a child process see the card of ``scenario``, to be laid over ``os.environ``.

    ``lost_after`` is how many questions are answered in ``lost_later`` and ``recovers`` before the card is
    lost; a reading asks 9, and 13 with processes.
    """
    path = [str(_library(scenario).parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": ":".join(path),
        "NVML_STUB_SCENARIO": scenario,
        "NVML_STUB_LOST_AFTER": str(lost_after),
    }


def install_nvml_stub(patch: pytest.MonkeyPatch, scenario: str, *, lost_after: int = 100) -> None:
    """Let ``pynvml`` in this process, and in children it starts, see the card of ``scenario``.

    The environment is too late for a process that runs, as the loader read it at the start. So ``pynvml`` is
    made to forget the library it may hold, and is led to ours when it asks for one by name.
    """
    import pynvml

    library = _library(scenario)
    for name, value in stub_env(scenario, lost_after=lost_after).items():
        patch.setenv(name, value)
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    patch.setattr(pynvml, "nvmlLib", None)
    patch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    patch.setattr(pynvml, "CDLL", lambda _name: ctypes.CDLL(str(library)))
    if scenario != "no_driver":
        ctypes.CDLL(str(library)).nvmlStubReset()


def _library(scenario: str) -> Path:
    return _no_driver() if scenario == "no_driver" else _stub()


@functools.cache
def _stub() -> Path:
    return build_stub(_fresh_folder())


@functools.cache
def _no_driver() -> Path:
    """A file of the driver's name that is no library: the loader goes no further, driver or not."""
    library = _fresh_folder() / LIBRARY
    library.write_text("not a library\n")
    return library


def _fresh_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="nvml-stub-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
