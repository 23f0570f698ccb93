"""A simulated GPU: the real ``pynvml`` over a driver library built from ``nvml_stub.c``.

``stub_env`` returns what to add to the environment of a child process, ``install_nvml_stub`` does the same
for the test's own process. The scenarios and the GPU that each simulates are listed in ``nvml_stub.c``.
Without a C compiler, every scenario but ``no_driver`` skips the test.
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

from qlora_tui.gpu.metrics import parse_version
from qlora_tui.gpu.torch_on_gpu import TorchBuild

LIBRARY = "libnvidia-ml.so.1"
_SOURCE = Path(__file__).with_name("nvml_stub.c")


def build_stub(folder: Path) -> Path:
    """Compile the stub into a folder and return its path. Skips the test without a compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build the NVML stub with")
    library = folder / LIBRARY
    flags = ["-std=c11", "-Wall", "-Wextra", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(_SOURCE)], check=True)
    return library


def stub_env(scenario: str, *, lost_after: int = 100) -> dict[str, str]:
    """Return what to add to the environment of a child process that is to see the GPU of ``scenario``.

    ``lost_after`` is the number of calls that succeed in ``lost_later`` and ``recovers`` before the GPU is
    lost; a reading makes 9 calls, and 13 with processes.
    """
    path = [str(library_path(scenario).parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": ":".join(path),
        "NVML_STUB_SCENARIO": scenario,
        "NVML_STUB_LOST_AFTER": str(lost_after),
    }


def library_path(scenario: str) -> Path:
    """Return the library of ``scenario``, built once in a process."""
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
    folder, owner = Path(tempfile.mkdtemp(prefix="nvml-stub-")), os.getpid()

    def delete() -> None:
        # A fork of this process that ends must not take the library away from it.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder


def install_torch(patch: pytest.MonkeyPatch, cuda: str | None, version: str = "2.13.0+") -> None:
    """Make this process take the installed torch for a build with this CUDA, or for one for the CPU.

    A ``version`` that ends with ``+`` gets the name that PyTorch gives its own builds.
    """
    if version.endswith("+"):
        version += f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    build = TorchBuild(version, "cuda" if cuda else "cpu", parse_version(cuda))
    patch.setattr("qlora_tui.gpu.torch_on_gpu.installed_torch", lambda: build)


def install_nvml_stub(patch: pytest.MonkeyPatch, scenario: str, *, lost_after: int = 100) -> None:
    """Make ``pynvml`` in this process, and in the children it starts, see the GPU of ``scenario``.

    The loader reads the environment when a process starts. So here ``pynvml`` also drops the library it may
    have loaded, and loads the stub in its place.
    """
    import pynvml

    environment = stub_env(scenario, lost_after=lost_after)
    library = library_path(scenario)
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # Whatever hardware the machine of the test has.
    patch.setattr("qlora_tui.gpu.nvml._CONTROL_DEVICE", Path("/nowhere"))
    patch.setattr("qlora_tui.gpu.nvml._PCI_DEVICES", Path("/nowhere"))
    patch.setattr(pynvml, "nvmlLib", None)
    patch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    patch.setattr(pynvml, "CDLL", lambda _name: ctypes.CDLL(str(library)))
    if scenario != "no_driver":
        ctypes.CDLL(str(library)).nvmlStubReset()
