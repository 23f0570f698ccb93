"""A tiny model and a little data, and trainers that start at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source, Training
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.retry import RetryPlan
from tests.training.tiny_model import make_tiny_model

MakeRecipe = Callable[..., Recipe]


class Trainer:
    """One trainer process."""

    def __init__(self, forkserver: Path, arguments: list[str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(forkserver))
        request = {"arguments": arguments, "environment": dict(os.environ)}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._socket.makefile()
        self.pid = int(self._answers.readline())
        self._code: int | None = None

    def wait(self) -> int:
        """Until it has ended; the exit code as ``subprocess`` gives it."""
        if self._code is None:
            self._code = int(self._answers.readline())
            self._answers.close()
            self._socket.close()
        return self._code


class Trainers:
    """Starts trainer processes; see :mod:`tests.training.trainer_forkserver`."""

    def __init__(self, folder: Path) -> None:
        # One thread each: the tests share their cores.
        os.environ["OMP_NUM_THREADS"] = "1"
        self.socket = folder / "forkserver"
        self._forkserver = subprocess.Popen(
            [sys.executable, "-m", "tests.training.trainer_forkserver", str(self.socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ready = False

    def wait_until_ready(self) -> None:
        """Until trainers start at once."""
        assert self._forkserver.stdout is not None
        if not self._ready:
            assert self._forkserver.stdout.readline() == "ready\n"
            self._ready = True

    def start(self, run: RunDir, plan: RetryPlan | None = None) -> Trainer:
        """A trainer for ``run``, in the environment as it is now."""
        self.wait_until_ready()
        return Trainer(self.socket, [str(run.path), *(plan or RetryPlan()).to_arguments()])

    def run(self, run: RunDir, plan: RetryPlan | None = None) -> int:
        """Run a trainer to its end."""
        return self.start(run, plan).wait()

    def close(self) -> None:
        """End the process that forks them."""
        assert self._forkserver.stdin is not None
        self._forkserver.stdin.close()
        self._forkserver.wait()


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    started = Trainers(tmp_path_factory.mktemp("trainers"))
    yield started
    started.close()


@pytest.fixture
def runner_starts_quickly(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainers that a runner starts have their imports behind them too."""
    trainers.wait_until_ready()
    monkeypatch.setenv("TRAINER_FORKSERVER", str(trainers.socket))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("quick_start")), prepend=os.pathsep)


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
        changed = Recipe(
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
                gradient_checkpointing="off",
            ),
        )
        for path, value in (settings or {}).items():
            changed = replace_setting(changed, path, value)
        return changed

    return make
