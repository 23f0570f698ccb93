"""A training step on the fake GPU: equal to that on the CPU, without mixed devices, and without waits.

No GPU is needed, and none is replaced: kernels, half precision, memory, speed and Liger's loss are for
``bench/gpu_acceptance.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.support.quick_starts import TRAINING_MODULES
from tests.support.trainer_processes import Trainers

pytestmark = pytest.mark.slow

NOT_OURS = ("masking_utils.py", "varlen_reference")
"""transformers asks whether a mask of padding masks anything; the written-out kernel reads samples."""


@pytest.fixture(scope="module")
def results(trainers: Trainers) -> dict[str, dict[str, Any]]:
    """The result of each case, from a separate process in which torch knows the fake GPU."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot be given a device by Python alone")
    command = [sys.executable, "-m", "tests.training.fake_cuda_steps"]
    with pytest.MonkeyPatch.context() as patch:
        trainers.server.serve(TRAINING_MODULES, patch)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {case.pop("case"): case for case in map(json.loads, done.stdout.splitlines()) if "case" in case}


CASES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mistral",
    "granite",
    "cohere",
    "4 bits",
    "checkpointing",
    "rank-stabilised",
    "DoRA",
    "token rows",
    "weighted tokens",
    "padded sequences",
    "no token in the loss",
    "dropout",
    "one call",
]
CHECKS = ["checks of llama", "checks of gemma2"]
LOADED = ["loading in nf4", "loading in fp4", "loading in int8", "loading experts"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu_is_that_on_the_cpu(results: dict[str, dict[str, Any]], case: str) -> None:
    result = results[case]
    assert "error" not in result, result["error"]
    assert result["refused"] == []
    assert result["loss"] == pytest.approx(result["on_cpu"], rel=1e-5)
    assert result["gradients_differ"] < 1e-4
    assert [wait for wait in result["waits"] if not any(name in wait for name in NOT_OURS)] == []


@pytest.mark.parametrize("case", CHECKS)
def test_what_is_proved_before_training_is_proved_on_a_gpu(
    results: dict[str, dict[str, Any]], case: str
) -> None:
    assert results[case] == {"loss_is_exact": True, "padding_free": True, "refused": []}


@pytest.mark.parametrize("case", LOADED)
def test_a_base_in_host_memory_is_quantized_on_the_gpu(results: dict[str, dict[str, Any]], case: str) -> None:
    assert results[case] == {"on_gpu": True, "in_host_memory": True, "equal": True, "refused": []}


def test_every_case_is_looked_at(results: dict[str, dict[str, Any]]) -> None:
    assert list(results) == CASES + CHECKS + LOADED
