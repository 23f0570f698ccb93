"""A simulated GPU: the real ``pynvml`` over a driver library built from ``nvml_stub.c``.

``stub_env`` returns what to add to the environment of a child process; ``tests.support.nvml_stub`` does the
same for a test's own process. The scenarios and the GPU that each simulates are listed in ``nvml_stub.c``.
All but ``no_driver`` need a C compiler.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
_SOURCE = Path(__file__).with_name("nvml_stub.c")


class NoCompiler(Exception):
    """There is no C compiler to build the stub with."""


def build_stub(folder: Path) -> Path:
    """Compile the stub as ``folder/libnvidia-ml.so.1``; return its path. Raises NoCompiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoCompiler("no C compiler (cc, gcc, clang) to build the NVML stub with")
    library = folder / LIBRARY
    flags = ["-std=c11", "-Wall", "-Wextra", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(_SOURCE)], check=True)
    return library


def stub_env(scenario: str, *, lost_after: int = 100) -> dict[str, str]:
    """Return what to add to the environment of a child process that is to see the GPU of ``scenario``.

    ``lost_after`` is the number of calls that succeed in ``lost_later`` and ``recovers`` before the GPU is
    lost; a reading makes 9 calls, and 13 with processes. Raises NoCompiler.
    """
    path = [str(library_path(scenario).parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": ":".join(path),
        "NVML_STUB_SCENARIO": scenario,
        "NVML_STUB_LOST_AFTER": str(lost_after),
    }


def library_path(scenario: str) -> Path:
    """Return the library of ``scenario``, built once in a process. Raises NoCompiler."""
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
