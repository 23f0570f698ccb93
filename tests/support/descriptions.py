"""Architectures in tests: read by forks of one process, once for each config in a session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog import described
from qlora_tui.worker import run_job
from tests.support.quick_starts import ForkServer

_IMPORTS = ("qlora_tui.training.description", "transformers.models.llama.modeling_llama")


class Descriptions:
    """What was described in this session."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._server: ForkServer | None = None
        self._known: dict[str, list[described.Description]] = {}

    def serve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Describe at once in the processes that this one starts."""
        if self._server is None:
            self._server = ForkServer(self._folder(), _IMPORTS)
        self._server.serve((described.JOB,), monkeypatch)

    def run(self, monkeypatch: pytest.MonkeyPatch, configs: Any, options: Any) -> list[described.Description]:
        """Stand for ``run_job`` in ``described``."""
        key = json.dumps(configs, sort_keys=True, default=str)
        if key not in self._known:
            self.serve(monkeypatch)
            self._known[key] = run_job(described.JOB, configs, **options)
        return self._known[key]

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.close()


@pytest.fixture(scope="session")
def descriptions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Descriptions]:
    started = Descriptions(lambda: tmp_path_factory.mktemp("descriptions"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def quick_descriptions(descriptions: Descriptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe each config once in a session."""

    def run(job: str, configs: Any, **options: Any) -> list[described.Description]:
        return descriptions.run(monkeypatch, configs, options)

    monkeypatch.setattr(described, "run_job", run)
