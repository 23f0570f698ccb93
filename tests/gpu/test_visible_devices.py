"""The GPU torch will use, by CUDA's rules."""

from __future__ import annotations

import os
import subprocess

import pytest

from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.visible_devices import (
    choose_gpu,
    cuda_device_order,
    default_cuda_device,
    device_variables,
    release_choice,
    requested_gpus,
    set_device_variables,
    visible_gpus,
)
from qlora_tui.runs.process import spawn_detached
from qlora_tui.settings import GPU_VARIABLE, config_path
from tests.support.nvml_stub import install_nvml_stub

NOT_PRESENT = GpuUnavailableReason.NOT_PRESENT
VISIBLE = "CUDA_VISIBLE_DEVICES"
RTX_4090, RTX_3060, GT_1030 = (
    f"GPU-{number}0001-1111-2222-3333-444455556666" for number in (4090, 3060, 1030)
)
GPUS = [
    GpuDevice(0, "A", "GPU-aaaa1111-0000", None, None, None),
    GpuDevice(1, "B", "GPU-aaaa2222-0000", None, None, None),
    GpuDevice(2, "C", "GPU-cccc3333-0000", None, None, None),
]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, "ABC"),
        ("1", "B"),
        ("2,0", "CA"),
        (" 2 , 1 ", "CB"),
        ("GPU-cccc3333-0000", "C"),
        ("GPU-cccc", "C"),
        ("GPU-aaaa2,GPU-c", "BC"),
        pytest.param("GPU-aaaa", "", id="a prefix of two GPUs names none"),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        pytest.param("0,2,-1,1", "AC", id="an invalid entry ends the list"),
        pytest.param("1,7,0", "B", id="an unknown index ends the list"),
        pytest.param("1,1", "", id="a GPU named twice hides all"),
        pytest.param("MIG-0c757cd7-e942-5726-a0b8-0e8fb7067135", "", id="a slice is no GPU"),
    ],
)
def test_cuda_visible_devices(value: str | None, names: str) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert "".join(gpu.name for gpu in cuda_device_order(GPUS, environ)) == names


@pytest.mark.parametrize(
    ("scenario", "option", "variable", "setting", "name", "variables"),
    [
        ("one_gpu", "", None, "auto", "RTX 4090", {}),
        ("two_gpus", "", None, "auto", "RTX 4090", {VISIBLE: RTX_4090}),
        ("display_first", "", None, "auto", "RTX 4090", {VISIBLE: RTX_4090}),
        ("display_first", "", "0", "auto", "GT 1030", {}),
        ("display_first", "1030", None, "auto", "GT 1030", {VISIBLE: GT_1030}),
        ("display_first", " gpu-1030 ", None, "auto", "GT 1030", {VISIBLE: GT_1030}),
        ("display_first", " 0", None, "auto", "GT 1030", {VISIBLE: GT_1030}),
        ("display_first", "Auto", None, "0", "RTX 4090", {VISIBLE: RTX_4090}),
        ("display_first", "", None, " AUTO", "RTX 4090", {VISIBLE: RTX_4090}),
        ("two_gpus", "CPU", None, "auto", GpuUnavailableReason.CPU_CHOSEN, {VISIBLE: ""}),
        ("display_first", "", None, "0", "GT 1030", {VISIBLE: GT_1030}),
        ("display_first", "auto", None, "0", "RTX 4090", {VISIBLE: RTX_4090}),
        ("display_first", "GPU-1030", None, "1", "GT 1030", {VISIBLE: GT_1030}),
        pytest.param("display_first", "", "0", "1", "GT 1030", {}, id="variable before setting"),
        pytest.param(
            "two_gpus", "3060", "0,1", "cpu", "RTX 3060", {VISIBLE: RTX_3060}, id="option before all"
        ),
        ("two_gpus", "2", None, "auto", NOT_PRESENT, {}),
        ("two_gpus", "RTX", None, "auto", NOT_PRESENT, {}),
        ("two_gpus", "", None, "RTX 5090", NOT_PRESENT, {}),
        ("two_gpus", "", "7", "auto", NOT_PRESENT, {}),
        ("two_gpus", "1", "0", "auto", NOT_PRESENT, {}),
        ("two_gpus", "cpu", "0", "auto", GpuUnavailableReason.CPU_CHOSEN, {VISIBLE: ""}),
        ("no_driver", "", None, "cpu", GpuUnavailableReason.CPU_CHOSEN, {VISIBLE: ""}),
        ("two_gpus", "", "-1", "auto", GpuUnavailableReason.HIDDEN, {}),
        ("two_gpus", "", "MIG-0c757cd7", "auto", GpuUnavailableReason.MIG, {}),
        ("sliced", "", None, "auto", GpuUnavailableReason.MIG, {}),
        ("no_driver", "", None, "auto", GpuUnavailableReason.NO_DRIVER, {}),
        ("no_driver", "7", None, "auto", NOT_PRESENT, {}),
        ("no_device", "", None, "RTX", NOT_PRESENT, {}),
    ],
)
def test_one_of_several_gpus_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    scenario: str,
    option: str,
    variable: str | None,
    setting: str,
    name: str | GpuUnavailableReason,
    variables: dict[str, str],
) -> None:
    install_nvml_stub(monkeypatch, scenario)
    environ = {GPU_VARIABLE: option} | ({} if variable is None else {VISIBLE: variable})
    config_path().write_text(f'gpu = "{setting}"\n')
    if isinstance(name, GpuUnavailableReason):
        with pytest.raises(GpuUnavailableError) as caught:
            choose_gpu(environ)
        assert caught.value.reason is name
        if name is NOT_PRESENT and scenario == "two_gpus":
            assert f'"{option or variable or setting}"' in caught.value.why and "RTX 4090" in caught.value.why
            assert ("several" in caught.value.why) == (option == "RTX")
    else:
        assert choose_gpu(environ).gpu.short_name == name
    assert device_variables(environ) == variables


def test_an_unreadable_setting_refuses_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    config_path().write_text("gpu = -1\n")
    with pytest.raises(GpuUnavailableError) as caught:
        choose_gpu({})
    assert caught.value.reason is GpuUnavailableReason.SETTING and caught.value.reason.device == "none"
    config_path().write_text("gpu = 0\n")
    assert choose_gpu({}).gpu.index == 0


def test_processes_of_torchrun_share_the_suitable_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = {"LOCAL_RANK": "0"}
    install_nvml_stub(monkeypatch, "two_gpus")
    assert device_variables(rank) == {VISIBLE: f"{RTX_4090},{RTX_3060}"}
    install_nvml_stub(monkeypatch, "display_first")
    assert device_variables(rank) == {VISIBLE: RTX_4090} and len(visible_gpus({})) == 1


def test_a_process_started_later_chooses_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "display_first")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    set_device_variables()
    assert (os.environ[VISIBLE], os.environ["CUDA_DEVICE_ORDER"]) == (RTX_4090, "PCI_BUS_ID")
    of_torchrun = (
        "TORCHELASTIC_RUN_ID",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    for name in of_torchrun:
        monkeypatch.setenv(name, "1")
    environments = []
    monkeypatch.setattr(subprocess, "Popen", lambda argv, **options: environments.append(options["env"]))
    spawn_detached("qlora_tui.runs.runner", output=None)
    assert environments[0].keys().isdisjoint((VISIBLE, *of_torchrun)) and "PATH" in environments[0]


def test_the_runner_has_no_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    monkeypatch.setattr("qlora_tui.gpu.visible_devices._variables_before", {})
    monkeypatch.setenv(GPU_VARIABLE, "1")
    assert requested_gpus() == "1"
    monkeypatch.delenv(GPU_VARIABLE)
    monkeypatch.setenv(VISIBLE, "1,0")
    assert requested_gpus() == f"{RTX_3060},{RTX_4090}"
    monkeypatch.setenv(GPU_VARIABLE, "1")
    release_choice()
    assert os.environ.keys().isdisjoint((GPU_VARIABLE, VISIBLE))


def test_the_first_visible_gpu_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    assert default_cuda_device().short_name == "RTX 4090"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3060")
    assert default_cuda_device().short_name == "RTX 3060"


def test_hiding_every_gpu_is_said_with_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    with pytest.raises(GpuUnavailableError) as caught:
        default_cuda_device({"CUDA_VISIBLE_DEVICES": ""})
    assert caught.value.reason is GpuUnavailableReason.HIDDEN
    assert caught.value.why == 'CUDA_VISIBLE_DEVICES is set to "".'


def test_a_machine_without_a_driver_says_so_whatever_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "no_driver")
    with pytest.raises(GpuUnavailableError) as caught:
        default_cuda_device({"CUDA_VISIBLE_DEVICES": ""})
    assert caught.value.reason is GpuUnavailableReason.NO_DRIVER
