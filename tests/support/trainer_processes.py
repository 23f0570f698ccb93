"""Trainer processes that start at once: forked from one that has its imports behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.memory_retry import RetryPlan
from tests.support.quick_start.fork_request import ForkRequest
from tests.support.quick_starts import TRAINING_MODULES, ForkServer, fork_server


class Trainer:
    """One trainer process."""

    def __init__(self, server: Path, run: RunDir, arguments: list[str]) -> None:
        with Path(os.devnull).open("rb") as nothing, run.log_path.open("ab") as log:
            streams = [nothing.fileno(), log.fileno(), log.fileno()]
            self._request = ForkRequest(
                str(server), "qlora_tui.training", [str(run.path), *arguments], streams
            )
        self.pid = self._request.pid
        self._code: int | None = None

    def wait(self) -> int:
        """Until it has ended; the exit code as ``subprocess`` gives it."""
        if self._code is None:
            self._code = self._request.wait()
        return self._code


class Trainers:
    """Starts trainer processes."""

    def __init__(self, server: ForkServer) -> None:
        self.server = server

    def start(self, run: RunDir, plan: RetryPlan | None = None) -> Trainer:
        """A trainer for ``run``, in the environment as it is now.

        It finds its model described, which otherwise another process would do for each.
        """
        with suppress(UserError):
            resolve_model(run.recipe().model.id)
        self.server.wait_until_ready()
        return Trainer(self.server.socket, run, (plan or RetryPlan()).to_arguments())

    def run(self, run: RunDir, plan: RetryPlan | None = None) -> int:
        """Run a trainer to its end."""
        return self.start(run, plan).wait()


@pytest.fixture(scope="session")
def trainers() -> Iterator[Trainers]:
    with fork_server("trainers") as server:
        yield Trainers(server)


@pytest.fixture
def quick_trainers(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that a runner starts, and other processes that need torch, start at once."""
    trainers.server.serve(TRAINING_MODULES, monkeypatch)
