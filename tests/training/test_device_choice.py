"""A trainer that finds a GPU it cannot use, with the CPU build of torch that the tests run with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Failed, Finished
from tests.support.nvml_stub import stub_env
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for a GPU"),
]


def train(run: RunDir) -> Failed | Finished:
    """Train a run on a machine whose driver reports an RTX 4090, and return how it ended."""
    subprocess.run(
        [sys.executable, "-m", "qlora_tui.training", str(run.path)],
        env={**os.environ, **stub_env("one_gpu"), "FORK_SERVERS": ""},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    ending = events(run)[-1]
    assert isinstance(ending, Failed | Finished)
    return ending


def test_a_gpu_that_torch_cannot_use_is_no_cpu_run(recipe: MakeRecipe) -> None:
    ending = train(create_run(recipe()))
    assert isinstance(ending, Failed) and ending.kind == "problem"
    assert ending.title == "torch cannot use the GPU" and "RTX 4090" in ending.what
    assert "cu126" in ending.fix and "--gpu cpu" in ending.fix
