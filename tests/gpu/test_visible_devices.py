"""The GPU torch will use, by CUDA's rules."""

from __future__ import annotations

import pytest

from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.visible_devices import cuda_device_order, default_cuda_device
from tests.support.nvml_stub import install_nvml_stub

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
    assert caught.value.why == 'It is set to "".'


def test_a_machine_without_a_driver_says_so_whatever_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "no_driver")
    with pytest.raises(GpuUnavailableError) as caught:
        default_cuda_device({"CUDA_VISIBLE_DEVICES": ""})
    assert caught.value.reason is GpuUnavailableReason.NO_DRIVER
