"""The acceptance script for a machine with a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.support.random_model import make_model
from tests.support.polling import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("acceptance") / "model", "tiny")


def acceptance(tmp_path: Path, model: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the script on the tiny model, with its temporary folder in ``tmp_path``."""
    command = [sys.executable, "-m", "bench.gpu_acceptance", "--size", "tiny", "--model", str(model)]
    return subprocess.Popen(
        [*command, "--out", str(tmp_path / "report.json"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )


def checks_in(tmp_path: Path) -> dict[str, Any]:
    checks: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())["checks"]
    return checks


def left_behind(tmp_path: Path) -> list[str]:
    """Processes whose temporary folder is in ``tmp_path``."""
    commands = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(tmp_path):
                commands.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return commands


@pytest.mark.usefixtures("quick_trainers")
def test_checks_run_dry_on_a_cpu(tmp_path: Path, model: Path) -> None:
    names = ("context", "four_bit", "varlen_attention", "step", "loop", "chat")
    process = acceptance(tmp_path, model, "--seconds", "3600", "--only", *names)
    output, _ = process.communicate()
    checks = checks_in(tmp_path)
    assert process.returncode == 0, output
    skipped = {name for name, check in checks.items() if check["result"] == "skipped"}
    assert skipped == {"machine", "context"}
    assert {name for name, check in checks.items() if check["result"] == "ok"} == {*names} - skipped
    assert checks["machine"]["figures"]["torch"]
    assert checks["chat"]["figures"]["short"]["ratio"] > 0
    # A killed process is listed until it has ended.
    wait_for(lambda: left_behind(tmp_path) == [])


def test_sigterm_ends_the_trainer_too_and_keeps_results(tmp_path: Path, model: Path) -> None:
    process = acceptance(tmp_path, model, "--only", "float16", "grid")
    wait_for(lambda: any("/runs/" in command for command in left_behind(tmp_path)), seconds=90)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, output
    wait_for(lambda: left_behind(tmp_path) == [])
    assert list(checks_in(tmp_path)) == ["machine", "float16"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
