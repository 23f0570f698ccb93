"""The verdicts of the first minutes on a GPU, from reports as the steps write them."""

from __future__ import annotations

from typing import Any

import pytest

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
        (probe_verdicts, {"triton_kernels": {"bfloat16": "No C compiler is found"}}, "wrong"),
        (probe_verdicts, {"triton_kernels": {"failed": "out of time"}}, "wrong"),
        (probe_verdicts, {"machine": {"has_gpu": False}}, "skipped"),
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
