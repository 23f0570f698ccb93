"""GPU, disk and queue, as checked for a launch and by ``doctor``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice, GpuProcess
from qlora_tui.memory.budget import budget_for
from qlora_tui.runs import doctor
from qlora_tui.runs.devices import Devices, RunDevice, claimed
from qlora_tui.runs.doctor import (
    Check,
    Machine,
    check_disk,
    check_exchange,
    check_gpu,
    check_kernels,
    read_machine,
)
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.servers import ServerStatus
from tests.support.nvml_stub import install_nvml_stub, install_torch

GIB = 1 << 30
GPU_0 = "GPU-40900001-1111-2222-3333-444455556666"
GPU = GpuDevice(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    uuid=None,
    total_bytes=24 * GIB,
    compute_capability="8.9",
    driver=None,
)


def machine(**facts: object) -> Machine:
    return Machine(budget_for(None), **facts)  # type: ignore[arg-type]


def no_gpu(reason: GpuUnavailableReason) -> Check:
    return check_gpu(machine(no_gpu=GpuUnavailableError(reason)))


def test_no_gpu_is_a_warning_with_the_reason() -> None:
    check = no_gpu(GpuUnavailableReason.NO_DRIVER)
    assert check.outcome == "warning" and check.problem is None
    assert check.text == "No GPU: runs train on the CPU, slowly. No NVIDIA driver found."


def test_a_gpu_that_cannot_be_used_blocks_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(monkeypatch, "13.0")
    for reason in GpuUnavailableReason:
        check = no_gpu(reason)
        assert (check.problem is not None) == (reason.device == "none"), reason
        assert ("--gpu cpu" in check.fix) == (reason.device == "none"), reason


def test_a_gpu_that_cannot_be_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(monkeypatch, "13.0")
    for reason in (GpuUnavailableReason.MIG, GpuUnavailableReason.NO_LIBRARY):
        check = no_gpu(reason)
        assert check.outcome == "warning" and check.text.startswith("Unknown GPU") and "CPU" not in check.text
    install_torch(monkeypatch, None)
    assert no_gpu(GpuUnavailableReason.MIG).problem is not None


def test_a_gpu_that_does_not_respond_blocks_a_run() -> None:
    check = check_gpu(machine(gpu=GPU, no_gpu=GpuUnavailableError(GpuUnavailableReason.LOST)))
    assert check.problem is not None and check.problem.title == "GPU lost"


def test_a_gpu_that_torch_cannot_use_blocks_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    install_torch(monkeypatch, None)
    check = check_gpu(read_machine())
    assert check.problem is not None and "RTX 4090" in check.text and "cu126" in check.fix
    install_torch(monkeypatch, "12.4")
    assert check_gpu(read_machine()).problem is None


def test_the_chosen_gpu_of_several_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "display_first")
    install_torch(monkeypatch, "12.4")
    assert check_gpu(read_machine()).text.startswith("RTX 4090 (GPU 1, the most memory of 2 GPUs)")


def test_an_exclusive_gpu_in_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch(monkeypatch, "12.4")
    install_nvml_stub(monkeypatch, "exclusive")
    assert "exclusive mode" in check_gpu(read_machine()).text
    install_nvml_stub(monkeypatch, "prohibited")
    assert "-c DEFAULT" in check_gpu(read_machine()).fix


def test_memory_of_other_programs_is_an_error_where_needed() -> None:
    used = machine(gpu=GPU, used_bytes=10 * GIB)
    assert check_gpu(used, 8 * GIB).outcome == "warning"
    check = check_gpu(used, 20 * GIB)
    assert check.outcome == "error"
    assert "10.0 GiB in use by other programs" in check.text and "the run needs 20.0 GiB" in check.fix


def test_the_memory_of_a_server_is_free_for_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    used = machine(gpu=GPU, used_bytes=10 * GIB)
    held = (GpuProcess(pid=7, memory_bytes=10 * GIB),)
    monkeypatch.setattr(doctor, "_gpu_processes", lambda gpu: held)
    assert check_gpu(used, 20 * GIB).outcome == "error"
    server = ServerStatus(process=process_identity(), address="", port=8000, base="", engine_pid=7)
    monkeypatch.setattr(doctor, "running_servers", lambda: [server])
    check = check_gpu(used, 20 * GIB)
    assert check.outcome == "ok" and "24.0 GiB free" in check.text


@pytest.mark.slow
def test_kernels_are_reported_on_a_gpu_only() -> None:
    assert check_kernels(machine()) == []
    checks = {check.label: check for check in check_kernels(machine(gpu=GPU))}
    linear = checks["flash-linear-attention"]
    assert linear.outcome == "note" and "qwen3_5" in linear.text and "pip install" in linear.fix
    assert "natten" not in checks, "the package of a vision model"


def test_a_full_disk_is_an_error_that_names_the_variable(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    assert check_disk(folder, 1, variable="XDG_STATE_HOME").outcome == "ok"
    check = check_disk(folder, 1 << 60, variable="XDG_STATE_HOME", name="disk for runs")
    assert (check.outcome, check.label) == ("error", "disk for runs")
    assert "XDG_STATE_HOME" in check.fix


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
@pytest.mark.parametrize(
    ("answer", "outcomes"),
    [
        ('b true\nas 1 "root"', ["warning"]),
        ('b false\nas 1 "root"', ["ok"]),
        ('b true\nas 2 "root" "me"', ["ok"]),
        ("", []),
    ],
)
def test_a_logout_that_would_end_runs_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, outcomes: list[str]
) -> None:
    (cgroup := tmp_path / "cgroup").write_text("0::/user.slice/user-1000.slice/session-3.scope\n")
    (bus := tmp_path / "busctl").write_text(f"#!/bin/sh\ncat <<'.'\n{answer}\n.\ntest -n '{answer}'\n")
    bus.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setattr(doctor, "_CGROUP", cgroup)
    assert [check.outcome for check in doctor.check_logout()] == outcomes
    cgroup.write_text("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n")
    assert doctor.check_logout() == []


@pytest.mark.usefixtures("quick_trainers")
def test_gpus_that_cannot_exchange_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun with two processes, which here use gloo."""
    install_nvml_stub(monkeypatch, "two_gpus")
    unlike, sums = check_exchange()
    assert unlike.outcome == "note" and "as fast as the slowest" in unlike.text
    assert sums.outcome == "ok" and "2 GPUs sum gradients at" in sums.text
    monkeypatch.setattr(doctor, "_EXCHANGE_S", 0.01)
    hangs = check_exchange()[1]
    assert hangs.outcome == "warning" and "no answer within" in hangs.text

    def by_host(processes: int, environ: dict[str, str] | None = None) -> tuple[float | None, str]:
        return (1e9, "") if environ else (None, "no answer")

    monkeypatch.setattr(doctor, "_exchange", by_host)
    assert "NCCL_P2P_DISABLE=1" in check_exchange()[1].fix
    with claimed(Devices((RunDevice(GPU_0),))):
        assert check_exchange()[1].text == "Not tested: a run uses GPU 0 (RTX 4090)."
