"""Triton's kernels for norms, rotary positions and gated MLPs, run by its interpreter on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.slow

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASES = [
    f"{family} {dtype}"
    for family in ("llama", "gemma3_text", "qwen3", "phi3")
    for dtype in ("float32", "float16")
]
LAYERS = 2
TOLERANCES = {"float32": 1e-5, "float16": 2e-2}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """The result of each case, from a process in which Triton interprets its kernels."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted_steps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_a_step_with_the_kernels_is_that_without(results: dict[str, dict[str, Any]], case: str) -> None:
    result, tolerance = results[case], TOLERANCES[case.split()[1]]
    assert result["logits"] < tolerance and result["gradients"] < tolerance
    # Forward, recomputation and backward. The halves of Phi-3's MLP are one projection, which is not fused.
    expected = {"rotate": 3 * LAYERS, "gated_product": 0 if case.startswith("phi3") else 3 * LAYERS}
    assert {name: result["calls"][name] for name in expected} == expected
    assert result["calls"]["rms_norm"] and result["calls"]["rms_norm_backward"]
    assert not any(result["calls_without"].values())


@needs_triton
def test_a_rotation_in_any_layout_is_that_in_float64(results: dict[str, dict[str, Any]]) -> None:
    assert results["rotation"]["roundings"] < 2


@needs_triton
def test_families_with_other_rotations_keep_theirs(results: dict[str, dict[str, Any]]) -> None:
    assert results["left to torch"]["families"] == ["cohere", "gpt_oss"]


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_any_width_are_those_of_float64(results: dict[str, dict[str, Any]], dtype: str) -> None:
    assert results[f"widths {dtype}"]["wrong"] == ""


@needs_triton
def test_wrong_kernels_are_refused(results: dict[str, dict[str, Any]]) -> None:
    mutants = {case: result["refused"] for case, result in results.items() if case.startswith("mutant")}
    assert len(mutants) == 9 and all(mutants.values()), mutants
