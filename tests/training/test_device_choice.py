"""A trainer that finds a GPU it cannot use, with the CPU build of torch that the tests run with."""

from __future__ import annotations

import pytest
import torch

from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Failed
from tests.support.nvml_stub import library_path, stub_env
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for a GPU"),
]


def test_a_gpu_that_torch_cannot_use_is_no_cpu_run(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose driver reports an RTX 4090."""
    load = f"lambda name: ctypes.CDLL({str(library_path('one_gpu'))!r})"
    before = f"import ctypes, pynvml\npynvml.nvmlLib, pynvml.CDLL = None, {load}"
    for name, value in {**stub_env("one_gpu"), "BEFORE_TRAINER": before}.items():
        monkeypatch.setenv(name, value)
    run = create_run(recipe())
    assert trainers.run(run) == 1
    ending = events(run)[-1]
    assert isinstance(ending, Failed) and ending.kind == "problem"
    assert ending.title == "torch cannot use the GPU" and "RTX 4090" in ending.what
    assert "cu126" in ending.fix and "--gpu cpu" in ending.fix
