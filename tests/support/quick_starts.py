"""Fork servers: child processes of tests that have their imports behind them.

See :mod:`tests.support.forkserver`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

QUICK_START = Path(__file__).parent / "quick_start"
TRAINING_IMPORTS = (
    "bitsandbytes",
    "peft",
    "qlora_tui.chat.session",
    "qlora_tui.engine.server",
    "transformers.models.llama.modeling_llama",
    "qlora_tui.training.attempt",
)
TRAINING_MODULES = (
    "qlora_tui.training",
    "qlora_tui.engine",
    "qlora_tui.export.export_job:run_job",
    "qlora_tui.training.description:describe_all",
    "qlora_tui.training.row_losses:measure",
    "qlora_tui.training.selftest:check_training",
    "qlora_tui.chat.task_answers:evaluate",
    "bench.acceptance.check",
    "bench.baselines.hf_trainer",
    "bench.chat",
    "bench.support.random_model",
    "tests.training.fake_cuda_steps",
    "tests.training.managed_states",
)
"""Modules and jobs that need torch, if no test is about the start of their process."""
WORKER_IMPORTS = (
    "qlora_tui.engine.server",
    "qlora_tui.export.llama_cpp.bindings",
    "qlora_tui.catalog.hub",
    "qlora_tui.catalog.download",
    # What the Hub's client imports; itself it reads the environment when it is imported.
    *("asyncio", "httpx2", "httpcore2", "anyio", "yaml", "filelock", "tqdm.auto"),
    "llama_cpp_py_sync._cffi_bindings",
)
WORKER_MODULES = (
    "qlora_tui.engine",
    "qlora_tui.export.hub_upload:prepare",
    "qlora_tui.export.hub_upload:upload",
    "qlora_tui.export.llama_cpp.worker",
    "tests.catalog.hub_question",
)
"""The same without torch."""


class ForkServer:
    """A process that has imported modules, and forks children which run others."""

    def __init__(self, folder: Path, imports: tuple[str, ...]) -> None:
        self.socket = folder / "forkserver"
        # What the libraries of the Hub read when they are imported, which is here.
        private = {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forkserver", str(self.socket), *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | private | {"HF_HUB_DISABLE_TELEMETRY": "1"},
        )
        self._ready = False

    def wait_until_ready(self) -> None:
        """Until children start at once."""
        assert self._process.stdout is not None
        if not self._ready:
            assert self._process.stdout.readline() == "ready\n"
            self._ready = True

    def serve(self, modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """Have processes that this one starts from now on run ``modules`` in forked children."""
        self.wait_until_ready()
        served = json.loads(os.environ.get("FORK_SERVERS", "{}"))
        served |= dict.fromkeys(modules, str(self.socket))
        monkeypatch.setenv("FORK_SERVERS", json.dumps(served))
        if str(QUICK_START) not in os.environ.get("PYTHONPATH", ""):
            monkeypatch.setenv("PYTHONPATH", str(QUICK_START), prepend=os.pathsep)

    def close(self) -> None:
        """End the process that forks them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


@pytest.fixture(scope="session")
def worker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    started = ForkServer(tmp_path_factory.mktemp("workers"), WORKER_IMPORTS)
    yield started
    started.close()


@pytest.fixture
def quick_workers(worker_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines and workers of llama.cpp start at once."""
    worker_server.serve(WORKER_MODULES, monkeypatch)


@pytest.fixture(autouse=True)
def quick_workers_if_slow(request: pytest.FixtureRequest) -> None:
    """The same for slow tests of the folders whose ``conftest`` imports this."""
    if request.node.get_closest_marker("slow") is not None:
        request.getfixturevalue("quick_workers")
