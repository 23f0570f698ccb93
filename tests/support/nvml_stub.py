"""A simulated GPU in the process of a test; see ``bench.support.nvml_stub``.

Without a C compiler, every scenario but ``no_driver`` skips the test.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from bench.support import nvml_stub
from bench.support.nvml_stub import NoCompiler
from qlora_tui.gpu.metrics import parse_version
from qlora_tui.gpu.torch_on_gpu import TorchBuild


def stub_env(scenario: str, *, lost_after: int = 100) -> dict[str, str]:
    """Return what to add to the environment of a child process that is to see the GPU of ``scenario``."""
    try:
        return nvml_stub.stub_env(scenario, lost_after=lost_after)
    except NoCompiler as error:
        pytest.skip(str(error))


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
    library = nvml_stub.library_path(scenario)
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
