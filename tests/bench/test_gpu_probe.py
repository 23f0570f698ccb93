"""Every question about a GPU can be asked; on a CPU of a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]
ROOT = Path(__file__).parents[2]
SKIPPED = {"context", "triton_kernels", "step_float16", "out_of_memory"}


def probe(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_probe", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_every_question_is_answered_on_a_cpu(tmp_path: Path) -> None:
    done = probe(tmp_path / "probe.json")
    answers = json.loads((tmp_path / "probe.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, answer in answers.items() if "skipped" in answer} == SKIPPED
    assert len(answers["new_lengths"]["our_order"]) == len(answers["new_lengths"]["lengths"])
    assert answers["step_small"]["4 × 16"]["tokens_per_s"] > 0


def test_a_question_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").write_text("not a model")
    arguments = ["--models", str(tmp_path / "models"), "--only", "step_small", "machine", "attention_kernels"]
    done = probe(tmp_path / "probe.json", *arguments)
    answers = json.loads((tmp_path / "probe.json").read_text())
    assert done.returncode == 1 and "failed" in answers["step_small"]
    assert "failed" not in answers["machine"] and list(answers) == [
        "machine",
        "attention_kernels",
        "step_small",
    ]


def test_no_question_is_begun_after_the_time(tmp_path: Path) -> None:
    done = probe(tmp_path / "probe.json", "--seconds", "-1", "--only", "machine")
    answers = json.loads((tmp_path / "probe.json").read_text())
    assert done.returncode == 1 and answers["machine"]["failed"] == "out of time"
