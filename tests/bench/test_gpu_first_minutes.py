"""The verdicts of the first minutes on a GPU, from reports as the steps write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import gpu_first_minutes
from bench.gpu_first_minutes import acceptance_verdicts, doctor_verdicts, probe_verdicts

CHECK = {"name": "training", "text": "20 steps", "fix": ""}
OUTCOME = {"summary": "6 steps", "figures": {"log": "a\nNo C compiler is found"}}
OOM = {"type": "OutOfMemoryError", "message": ""}


@pytest.mark.parametrize(
    ("read", "report", "result"),
    [
        (doctor_verdicts, {"checks": [CHECK | {"outcome": "warning"}]}, "ok"),
        (doctor_verdicts, {"checks": [CHECK | {"outcome": "error"}]}, "wrong"),
        (probe_verdicts, {"triton_kernels": {"bfloat16": "used", "float16": "used"}}, "ok"),
        (probe_verdicts, {"triton_kernels": {"bfloat16": "No C compiler", "float16": "used"}}, "wrong"),
        (probe_verdicts, {"triton_kernels": {"failed": "out of time"}}, "wrong"),
        (probe_verdicts, {"machine": {"has_gpu": False, "torch": "2.13.0"}}, "skipped"),
        (probe_verdicts, {"out_of_memory": {"tensor": OOM | {"recognized": True}, "seconds": 1}}, "ok"),
        (probe_verdicts, {"out_of_memory": {"tensor": OOM | {"recognized": False}, "seconds": 1}}, "wrong"),
        (acceptance_verdicts, {"checks": {"loop": OUTCOME | {"result": "ok"}}}, "ok"),
        (acceptance_verdicts, {"checks": {"loop": OUTCOME | {"result": "out of time"}}}, "wrong"),
    ],
)
def test_a_report_becomes_a_verdict(read: Any, report: dict[str, Any], result: str) -> None:
    (verdict,) = read(report)
    assert verdict.result == result and str(verdict)[0] == {"ok": "✓", "wrong": "✗", "skipped": "–"}[result]


def test_a_failed_check_ends_with_the_last_line_of_its_log() -> None:
    (verdict,) = acceptance_verdicts({"checks": {"loop": OUTCOME | {"result": "failed"}}})
    assert str(verdict).endswith("▸ No C compiler is found")


@pytest.mark.parametrize(
    ("name", "answer", "sentence"),
    [
        (
            "machine",
            {"has_gpu": True, "torch": "2.13.0", "cuda": "13.0", "visible_gpus": 1, "gpu": "RTX 4090"}
            | {"driver": "580.1", "expandable_segments": True},
            "torch 2.13.0 with CUDA 13.0 sees 1 GPU(s), the first RTX 4090 with driver 580.1; "
            "the allocator grows its segments",
        ),
        (
            "context",
            {"names_process": True, "context_mib": 300, "with_cublas_mib": 320, "workspace_mib": 8},
            "a process takes 300 MiB besides its tensors, 320 MiB with cuBLAS, whose workspace takes 8 MiB "
            "of the tensors",
        ),
        ("context", {"names_process": False}, "NVML does not report the memory of this process"),
        (
            "triton_kernels",
            {"bfloat16": "used", "float16": "No C\ncompiler", "norm_ms": [0.03, 0.05]},
            "used in bfloat16; refused in float16: No C compiler; a norm takes 0.03 ms, 0.05 ms in torch",
        ),
        (
            "four_bit",
            {"difference_from_cpu": 0.0012, "unpack_gb_s": 700.0, "1 rows": {"ms": 0.02, "equal_twice": True}}
            | {"16 rows": {"ms": 0.1, "equal_twice": False}},
            "NF4 differs from the CPU's by 0.0012, unpacks 700.0 GB/s; products of 16 rows are not repeated "
            "bit by bit: 1 rows in 0.02 ms, 16 rows in 0.1 ms",
        ),
        (
            "varlen_attention",
            {"schema": "flash(Tensor q)", "4 samples": {"by_sample_ms": 3.0, "in_one_call": "no kernel"}},
            "4 samples one by one take 3.0 ms; refused in one call: no kernel",
        ),
        (
            "out_of_memory",
            {"tensor": OOM | {"recognized": True}, "product": OOM | {"recognized": False}},
            "a tensor on a full GPU raises OutOfMemoryError, recognized; "
            "a product on a full GPU raises OutOfMemoryError, not recognized",
        ),
        ("context", {"skipped": "there is no GPU"}, "there is no GPU"),
        ("four_bit", {"failed": "out of time"}, "out of time"),
    ],
)
def test_each_question_has_a_sentence(name: str, answer: dict[str, Any], sentence: str) -> None:
    (verdict,) = probe_verdicts({name: answer | {"seconds": 1.0}})
    assert verdict.text == sentence


def test_every_question_of_the_first_minutes_is_one_of_the_probe() -> None:
    source = Path(gpu_first_minutes.__file__).parent / "gpu_probe"
    text = "".join(file.read_text() for file in source.glob("*.py"))
    assert [name for name in gpu_first_minutes._SENTENCES if f"def {name}(probe" not in text] == []
