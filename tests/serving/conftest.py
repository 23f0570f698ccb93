"""One real server for the whole room: a tiny model with two runs, whose engine is forked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import RunDir
from tests.chat.conftest import tiny_model, tiny_source
from tests.support.nvml_stub import stub_env
from tests.support.polling import wait_for
from tests.support.quick_starts import TRAINING_MODULES
from tests.support.trainer_processes import Trainers

__all__ = ["tiny_model", "tiny_source"]

FIRST, SECOND = "tiny-1.0", "tiny-b"
KEY = "a key for tests"


@dataclass(frozen=True)
class Served:
    """A server process."""

    process: subprocess.Popen[str]
    home: Path
    status: dict[str, Any]
    """What ``serve --json`` printed."""

    @property
    def url(self) -> str:
        return str(self.status["address"])

    @property
    def state(self) -> dict[str, Any]:
        """The state file."""
        return json.loads((self.state_dir / "servers" / f"{self.status['port']}.json").read_text())  # type: ignore[no-any-return]

    @property
    def state_dir(self) -> Path:
        return self.home / "qlora-tui"

    def run(self, name: str) -> RunDir:
        return RunDir(self.state_dir / "runs" / name)

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {KEY}", **headers}, timeout=60
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def wait_for(self, state: str) -> None:
        """Until the model is ``ready``, ``yielded`` …"""
        wait_for(lambda: self.state["state"] == state, saying=f"a server that is {state}")


def write_run(home: Path, name: str, source: ChatSource, adapters: dict[str, str]) -> RunDir:
    """Write a run with a final adapter, and a checkpoint of step 2, from these adapters of the source."""
    run = RunDir(home / "qlora-tui" / "runs" / name)
    run.path.mkdir(parents=True)
    run.recipe_path.write_text(dump(source.recipe))
    run.events_path.touch()
    for adapter, given in adapters.items():
        folder = run.adapter_dir if adapter == "adapter" else run.checkpoints_dir / adapter
        shutil.copytree(source.adapters[given], folder)
        (folder / "complete").touch()
    return run


@contextmanager
def serving(home: Path, *arguments: str) -> Iterator[Served]:
    """A server of the runs in a folder."""
    environ = os.environ | {
        **{f"XDG_{name}_HOME": str(home) for name in ("STATE", "CONFIG", "CACHE")},
        "QLORA_TUI_API_KEY": KEY,
        **stub_env("no_driver"),
    }
    argv = [sys.executable, "-m", "qlora_tui", "serve", "--port", "0", "--json", *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environ, text=True) as process:
        assert process.stdout is not None
        try:
            yield Served(process, home, json.loads(process.stdout.readline()))
        finally:
            process.terminate()
            assert process.wait(timeout=20) == 0
            assert list((home / "qlora-tui" / "servers").glob("*.json")) == []


@pytest.fixture(scope="session")
def served(
    trainers: Trainers, tiny_source: ChatSource, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("serving")
    write_run(home, FIRST, tiny_source, {"adapter": "adapter", "step-2": "step-2"})
    write_run(home, SECOND, tiny_source, {"adapter": "step-2", "step-7": "adapter"})
    with ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            # Only while it starts: what later tests of this session start has an environment of its own.
            trainers.server.serve(TRAINING_MODULES, patch)
            server = opened.enter_context(serving(home, FIRST, SECOND, "--alias", f"gpt-4o-mini={FIRST}"))
        server.wait_for("ready")
        yield server
