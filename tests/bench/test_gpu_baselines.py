"""The comparisons for a GPU run dry on a CPU, with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_baselines
from bench.baselines.job import TrainingJob
from bench.support.random_model import make_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "tiny", "tiny")
    return folder


def module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def baselines(models: Path, out: Path, *arguments: object) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    common = ("--size", "tiny", "--models", models, "--row-tokens", 64, "--samples", 6, "--out", out)
    done = module("bench.gpu_baselines", *common, *arguments)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())


def test_trainers_take_turns_on_the_same_rows(models: Path, tmp_path: Path) -> None:
    ways = ("qlora_tui_run", "hf_trainer")
    code, runs = baselines(models, tmp_path / "out.json", "--ways", *ways, "--turns", 1)
    assert code == 0 and len(runs) == 2, runs
    (ours,), (plain,) = runs.values()
    assert ours["tokens"] == plain["tokens"] and ours["steps"] == plain["steps"] == 6
    assert ours["tokens_per_s"] > 0 and plain["tokens_per_s"] > 0


def test_a_run_is_cut_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(gpu_baselines, "end_descendants", lambda: ended.append(True))
    job = TrainingJob(model="", rows=str(tmp_path / "rows"), out="", dtype="float32")

    def endless(*args: object) -> None:
        while True:
            pass

    monkeypatch.setattr(gpu_baselines, "measure", endless)
    run = gpu_baselines.run_once(job, "hf_trainer", "first", until=0.0)
    assert run["failed"] == "the deadline passed" and ended == [True]
