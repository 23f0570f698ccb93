from __future__ import annotations

import pytest

from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.visible_devices import default_cuda_device
from tests.support.nvml_stub import install_nvml_stub


def test_a_simulated_gpu_ends_with_its_test() -> None:
    with pytest.MonkeyPatch.context() as patch:
        install_nvml_stub(patch, "one_gpu")
        assert default_cuda_device().short_name == "RTX 4090"
    with pytest.raises(GpuUnavailableError):
        default_cuda_device()
