"""A tiny model and a little data, and trainers that start at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.recipe.fields import with_value
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source, Training
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.retry import Plan
from tests.training.tiny import make_tiny_model

MakeRecipe = Callable[..., Recipe]


class Trainer:
    """One trainer process."""

    def __init__(self, zygote: subprocess.Popen[str], pid: int) -> None:
        self._zygote = zygote
        self.pid = pid
        self._code: int | None = None

    def wait(self) -> int:
        """Until it has ended; the exit code as ``subprocess`` gives it."""
        if self._code is None:
            assert self._zygote.stdout is not None
            self._code = int(self._zygote.stdout.readline())
        return self._code


class Trainers:
    """Starts trainer processes, one at a time; see :mod:`tests.training.zygote`."""

    def __init__(self) -> None:
        # One thread each: the tests share their cores.
        os.environ["OMP_NUM_THREADS"] = "1"
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.training.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ready = False

    def start(self, run: RunDir, plan: Plan | None = None) -> Trainer:
        """A trainer for ``run``, in the environment as it is now."""
        assert self._zygote.stdin is not None and self._zygote.stdout is not None
        if not self._ready:
            assert self._zygote.stdout.readline() == "ready\n"
            self._ready = True
        plan = plan or Plan()
        asked = {
            "run": str(run.path),
            "plan": {key: getattr(plan, key) for key in plan.__struct_fields__},
            "environment": dict(os.environ),
        }
        self._zygote.stdin.write(json.dumps(asked) + "\n")
        self._zygote.stdin.flush()
        return Trainer(self._zygote, int(self._zygote.stdout.readline()))

    def run(self, run: RunDir, plan: Plan | None = None) -> int:
        """Run a trainer to its end."""
        return self.start(run, plan).wait()

    def close(self) -> None:
        """End the process that forks them."""
        assert self._zygote.stdin is not None
        self._zygote.stdin.close()
        self._zygote.wait()


@pytest.fixture(scope="session")
def trainers() -> Iterator[Trainers]:
    started = Trainers()
    yield started
    started.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short conversations."""
    file = tmp_path_factory.mktemp("data") / "facts.jsonl"
    with file.open("w") as lines:
        for i in range(60):
            messages = [
                {"role": "user", "content": f"what is {i}"},
                {"role": "assistant", "content": f"the answer is {i * 7 % 13} and {'fox ' * (i % 9)}"},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture
def recipe(tiny_model: Path, tiny_data: Path) -> MakeRecipe:
    """Makes a recipe that trains in a second or two: ``recipe({"training.epochs": 3})`` changes settings."""

    def make(settings: dict[str, Any] | None = None) -> Recipe:
        made = Recipe(
            model=Model(id=str(tiny_model)),
            # Whatever the CPU is quickest at: losses are compared to more digits than 16 bits have.
            quantization=Quantization(compute_dtype="float32"),
            lora=Lora(rank=8, alpha=16),
            data=Data(sources=(Source(path=str(tiny_data)),), max_length=128, validation_fraction=0.1),
            training=Training(
                optimizer="adamw",
                learning_rate=2e-3,
                gradient_accumulation=2,
                epochs=2,
                gradient_checkpointing=False,
            ),
        )
        for path, value in (settings or {}).items():
            made = with_value(made, path, value)
        return made

    return make
