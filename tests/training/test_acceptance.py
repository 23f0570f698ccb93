"""The acceptance script for a machine with a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("training")]


def test_the_acceptance_of_a_gpu_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.gpu_acceptance", "--size", "tiny", "--out", str(out)]
    done = subprocess.run(
        [*command, "--only", "loop", "resume", "memory", "nvml", "ways"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    checks = report["checks"]
    assert checks["loop"]["figures"]["tokens_per_s"] > 0
    assert len(checks["resume"]["figures"]["resumed"]) == 8
    assert all("skipped" in checks[name]["figures"] for name in ("memory", "nvml", "ways"))
    assert report["box"]["torch"]
