"""Whether the installed torch can use a GPU, known without importing it."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from qlora_tui.gpu import torch_on_gpu
from qlora_tui.gpu.errors import GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.torch_on_gpu import (
    TorchBuild,
    architecture_problem,
    install_fix,
    installed_torch,
    torch_problem,
    why_on_the_cpu,
)
from tests.support.nvml_stub import install_nvml_stub, install_torch

TORCH_2_6 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def gpu(name: str, capability: str, cuda: str, driver: str = "580.1") -> GpuDevice:
    return GpuDevice(0, name, None, 1 << 34, capability, driver, cuda_version=cuda)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        (
            "from typing import Optional\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n",
            TorchBuild("2.13.0+cpu", "cpu"),
        ),
        (
            "__version__ = '2.6.0+cu124'\ncuda: Optional[str] = '12.4'\nhip = None\n",
            TorchBuild("2.6.0+cu124", "cuda", (12, 4)),
        ),
        ("__version__ = '2.9.0+rocm6.4'\ncuda = None\nhip = '6.4.43'\n", TorchBuild("2.9.0+rocm6.4", "rocm")),
        ("__version__ = '3.0'\n", TorchBuild("3.0", "unknown")),
        ("no Python", TorchBuild("", "unknown")),
        (None, None),
    ],
)
def test_the_build_is_read_from_its_version_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, build: TorchBuild | None
) -> None:
    (tmp_path / "version.py").write_text(text or "")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(torch_on_gpu, "find_spec", lambda name: spec if text else None)
    assert installed_torch.__wrapped__() == build


@pytest.mark.parametrize(
    ("device", "cuda", "words"),
    [
        (gpu("RTX 4090", "8.9", "12.4", "550.54"), "12.8", None),
        (gpu("RTX 4090", "8.9", "13.1"), "13.0", None),
        (gpu("RTX 5090", "12.0", "13.0"), "12.8", None),
        (gpu("GTX 1080", "6.1", "13.0"), "12.6", None),
        (gpu("RTX 4090", "8.9", "13.0"), None, ("built for the CPU", "cu130")),
        (gpu("RTX 4090", "8.9", "12.4", "550.54"), "13.0", ("CUDA 13 needs a newer driver, 580", "cu126")),
        (gpu("RTX 5090", "12.0", "12.8", "570.1"), "13.0", ("Driver 570.1", "cu128")),
        (gpu("RTX 3090", "8.6", "11.4", "470.1"), "12.6", ("525", "pytorch.org/get-started")),
        (gpu("GTX 1080", "6.1", "13.0"), "13.0", ("capability 6.1", "7.5 and newer", "cu126")),
        (gpu("RTX 5070", "12.0", "12.8"), "12.4", ("capability 12.0", "CUDA 12.8", "cu128")),
        (gpu("GTX 1080", "6.1", "13.0"), "12.8", ("capability 6.1", "7.5 and newer", "cu126")),
        (gpu("GTX 1080", "6.1", "12.8"), "12.9", ("capability 6.1", "7.5 and newer", "cu126")),
        (gpu("V100", "7.0", "13.0"), "12.8", ("capability 7.0", "7.5 and newer", "cu126")),
        (gpu("V100", "7.0", "13.0"), "12.6", None),
    ],
)
def test_a_build_that_cannot_use_the_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: GpuDevice, cuda: str | None, words: tuple[str, ...] | None
) -> None:
    install_torch(monkeypatch, cuda)
    problem = torch_problem(device)
    if words is None:
        assert problem is None
    else:
        assert problem is not None and "--gpu cpu" in problem.fix
        assert [word for word in words if word not in str(problem)] == []


@pytest.mark.parametrize(
    ("version", "capability", "runs"),
    [
        ("2.7.1+", "7.0", False),
        ("2.8.0+", "7.0", True),
        ("2.8.0+", "6.1", False),
        ("2.10.0+", "7.0", True),
        ("2.11.0+", "7.0", False),
        pytest.param("2.11.0", "6.1", True, id="a build of others"),
    ],
)
def test_what_pytorch_builds_for_cuda_12_8_has_code_for(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: str, runs: bool
) -> None:
    install_torch(monkeypatch, "12.8", version)
    assert (torch_problem(gpu("a GPU", capability, "12.8")) is None) == runs


@pytest.mark.parametrize(
    ("capability", "cuda", "build"),
    [("11.0", "13.0", ""), ("9.0", "13.0", ""), ("11.0", "12.8", "cu130"), ("3.7", "13.0", "")],
)
def test_the_installed_build_is_no_remedy(
    monkeypatch: pytest.MonkeyPatch, capability: str, cuda: str, build: str
) -> None:
    install_torch(monkeypatch, cuda)
    fix = install_fix(gpu("a GPU", capability, "13.0"))
    assert "pytorch.org" in fix and ("index-url" in fix) == bool(build) and build in fix


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), TORCH_2_6, True),
        ((12, 0), TORCH_2_6, False),
        ((6, 1), TORCH_2_6, True),
        ((6, 1), CUDA_13, False),
        ((12, 1), CUDA_13, True),
        ((11, 0), CUDA_13, False),
        pytest.param((12, 0), ("sm_90", "compute_90"), True, id="code to compile later"),
        pytest.param((10, 3), ("sm_90a", "sm_100a"), False, id="code for one architecture only"),
        pytest.param((10, 3), ("sm_100f",), True, id="code for a family"),
        ((8, 9), (), True),
        ((8, 9), ("sm_next",), True),
    ],
)
def test_code_runs_on_later_gpus_by_the_rules_of_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    install_torch(monkeypatch, "13.0")
    problem = architecture_problem("a GPU", capability, architectures)
    assert (problem is None) == runs
    if problem is not None:
        assert architectures[0] in problem.why and "pytorch.org" in problem.fix


@pytest.mark.parametrize(
    ("scenario", "environ", "title"),
    [
        ("no_driver", {}, ""),
        ("no_device", {}, ""),
        ("one_gpu", {"CUDA_VISIBLE_DEVICES": ""}, ""),
        ("one_gpu", {"QLORA_TUI_GPU": "cpu"}, ""),
        ("one_gpu", {}, "torch cannot use the GPU"),
        ("sliced", {}, "torch cannot use the GPU"),
        ("one_gpu", {"CUDA_VISIBLE_DEVICES": "3"}, "No such GPU"),
        ("mismatch", {}, "NVIDIA driver mismatch"),
        ("not_loaded", {}, "NVIDIA driver not loaded"),
        ("lost", {}, "GPU lost"),
    ],
)
@pytest.mark.parametrize("cuda", [None, "12.4"])
def test_a_process_without_cuda_computes_only_where_meant(
    monkeypatch: pytest.MonkeyPatch, scenario: str, environ: dict[str, str], title: str, cuda: str | None
) -> None:
    install_nvml_stub(monkeypatch, scenario)
    install_torch(monkeypatch, cuda)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    problem = why_on_the_cpu()
    assert (problem.title if problem else "") == title
    assert problem is None or (problem.what and problem.why and "--gpu cpu" in problem.fix)


def test_every_reason_says_where_a_run_would_train() -> None:
    assert {reason.device for reason in GpuUnavailableReason} == {"cpu", "unknown", "none"}
