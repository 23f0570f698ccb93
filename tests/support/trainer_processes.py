"""Trainer processes that start at once: forked from one that has its imports behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.retry import RetryPlan

QUICK_START = Path(__file__).parents[1] / "training" / "quick_start"


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
    monkeypatch.setenv("PYTHONPATH", str(QUICK_START), prepend=os.pathsep)
