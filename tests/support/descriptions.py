"""Architectures in tests: read by forks of one process, once for each config in a session."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_tui.catalog import described
from qlora_tui.worker import run_job
from tests.support.quick_starts import ForkServer
from tests.support.trainer_processes import Trainers


class Descriptions:
    """What was described in this session."""

    def __init__(self, server: ForkServer) -> None:
        self.server = server
        """The process whose forks describe."""
        self._known: dict[str, list[described.Description]] = {}

    def run(self, configs: Any, options: Any) -> list[described.Description]:
        """Stand for ``run_job`` in ``described``."""
        key = json.dumps(configs, sort_keys=True, default=str)
        if key not in self._known:
            with pytest.MonkeyPatch.context() as patch:
                self.server.serve((described.JOB,), patch)
                self._known[key] = run_job(described.JOB, configs, **options)
        return self._known[key]


@pytest.fixture(scope="session")
def descriptions(trainers: Trainers) -> Descriptions:
    return Descriptions(trainers.server)


@pytest.fixture(autouse=True)
def quick_descriptions(
    request: pytest.FixtureRequest, descriptions: Descriptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Describe each config once in a session; in processes that slow tests start, at once."""

    is_slow = request.node.get_closest_marker("slow") is not None

    def run(job: str, configs: Any, **options: Any) -> list[described.Description]:
        assert is_slow, "a test that describes a model takes seconds: mark it slow"
        return descriptions.run(configs, options)

    monkeypatch.setattr(described, "run_job", run)
    if is_slow:
        descriptions.server.serve((described.JOB,), monkeypatch, waits=False)
