"""Having no GPU is an answer with sentences in it."""

from __future__ import annotations

import pickle

import pytest

from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason, from_nvml_error


@pytest.mark.parametrize("reason", GpuUnavailableReason)
def test_every_reason_says_what_and_what_to_do(reason: GpuUnavailableReason) -> None:
    no_gpu = GpuUnavailableError(reason)
    assert isinstance(no_gpu, UserError)
    assert no_gpu.title
    assert no_gpu.what.endswith(".")
    assert no_gpu.fix.endswith(".")


def test_an_unknown_nvml_error_shows_nvmls_own_text() -> None:
    assert from_nvml_error(999, "Unknown Error").why == "NVML says: Unknown Error."


def test_it_crosses_a_process_border_whole() -> None:
    copy = pickle.loads(pickle.dumps(GpuUnavailableError(GpuUnavailableReason.HIDDEN, "It is empty.")))
    assert (copy.reason, copy.why) == (GpuUnavailableReason.HIDDEN, "It is empty.")
