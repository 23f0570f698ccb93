"""Fork servers: child processes of tests that have their imports behind them.

See :mod:`tests.support.forkserver`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from socket import AF_UNIX
from socket import socket as Socket
from tempfile import TemporaryDirectory

import pytest

from tests.support.nvml_stub import stub_env

QUICK_START = Path(__file__).parent / "quick_start"
TRAINING_IMPORTS = (
    "bitsandbytes",
    "peft",
    "qlora_tui.chat.session",
    "qlora_tui.engine.server",
    "transformers.models.llama.modeling_llama",
    "transformers.models.lfm2.modeling_lfm2",  # and what it takes from torch's compiler
    "qlora_tui.training.attempt",
    "qlora_tui.training.description",
    "torch.distributed.run",
)
TRAINING_MODULES = (
    "qlora_tui.training",
    "qlora_tui.engine",
    "qlora_tui.export.export_job:run_job",
    "qlora_tui.training.all_reduce",
    "qlora_tui.training.description:describe_all",
    "qlora_tui.training.gguf_weights:convert",
    "qlora_tui.training.probe:probe",
    "qlora_tui.training.quantization_quality:measure_quality",
    "qlora_tui.training.row_losses:measure",
    "qlora_tui.training.selftest:check_training",
    "qlora_tui.chat.prediction:predict",
    "qlora_tui.chat.task_answers:evaluate",
    "bench.acceptance.check",
    "bench.baselines.hf_trainer",
    "bench.chat",
    "bench.support.random_model",
    "tests.memory.test_measured",
    "tests.training.fake_cuda_steps",
    "tests.training.managed_states",
    "torch.distributed.run",
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
    "qlora_tui.engine.data_service:count_data",
    "qlora_tui.export.hub_upload:prepare",
    "qlora_tui.export.hub_upload:upload",
    "qlora_tui.export.llama_cpp.worker",
    "tests.catalog.hub_question",
)
"""The same without torch."""
CONFINED_MODULES = (
    "qlora_tui.data.chat_template",
    "qlora_tui.data.arrow_rows",
    "qlora_tui.data.dataset_scan",
)
"""What confined children import; almost each process of a test starts one."""

IMPORTS = {
    "confined": CONFINED_MODULES,
    "trainers": TRAINING_IMPORTS,
    "workers": WORKER_IMPORTS,
}
"""What each server imports, once it is asked for the first time."""
SHARED = "SHARED_FORK_SERVERS"
"""In the environment of workers of pytest-xdist: the folder of the sockets of the servers that all use."""


class ForkServer:
    """A process that has imported modules, and forks children which run others."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._ready = False

    def wait_until_ready(self) -> None:
        """Until children start at once."""
        if not self._ready:
            with Socket(AF_UNIX) as client:
                client.connect(str(self.socket))
                client.sendall(b"null\n")
                assert client.recv(8) == b"0\n"
            self._ready = True

    def serve(self, modules: Iterable[str], monkeypatch: pytest.MonkeyPatch, *, waits: bool = True) -> None:
        """Have processes that this one starts from now on run ``modules`` in forked children.

        Unless it ``waits`` until the server is ready, the first of them may wait for its imports.
        """
        if waits:
            self.wait_until_ready()
        served = json.loads(os.environ.get("FORK_SERVERS", "{}"))
        served |= dict.fromkeys(modules, str(self.socket))
        monkeypatch.setenv("FORK_SERVERS", json.dumps(served))
        if str(QUICK_START) not in os.environ.get("PYTHONPATH", ""):
            monkeypatch.setenv("PYTHONPATH", str(QUICK_START), prepend=os.pathsep)


@contextmanager
def fork_server(name: str) -> Iterator[ForkServer]:
    """A server that is shared by all workers of pytest-xdist, or else one of this process."""
    if shared := os.environ.get(SHARED):
        yield ForkServer(Path(shared) / name)
        return
    with TemporaryDirectory(prefix="fork-server-") as folder, started(Path(folder), name):
        yield ForkServer(Path(folder) / name)


@contextmanager
def started(folder: Path, *names: str) -> Iterator[None]:
    """Processes that listen on sockets with their names in a folder."""
    for module in (*TRAINING_MODULES, *WORKER_MODULES):
        # Looking for a module imports its packages, and torch takes seconds.
        assert module.startswith("torch.") or find_spec(module.partition(":")[0]), module
    # What the libraries of the Hub read when they are imported, and no driver of a GPU.
    private = {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environ = os.environ | private | stub_env("no_driver")
    processes = []
    for name in names:
        with Socket(AF_UNIX) as listener:
            listener.bind(str(folder / name))
            listener.listen()
            number = listener.fileno()
            argv = [sys.executable, "-m", "tests.support.forkserver", str(number), *IMPORTS[name]]
            processes.append(subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=[number], env=environ))
    try:
        yield
    finally:
        for process in processes:
            process.communicate(timeout=30)


@pytest.fixture(scope="session", autouse=True)
def quick_confined() -> Iterator[None]:
    """Confined children of all processes start at once."""
    with fork_server("confined") as server, pytest.MonkeyPatch.context() as patch:
        server.serve(CONFINED_MODULES, patch, waits=False)
        yield


@pytest.fixture(scope="session")
def worker_server() -> Iterator[ForkServer]:
    with fork_server("workers") as server:
        yield server


@pytest.fixture
def quick_workers(worker_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines and workers of llama.cpp start at once."""
    worker_server.serve(WORKER_MODULES, monkeypatch)


@pytest.fixture(autouse=True)
def quick_workers_if_slow(request: pytest.FixtureRequest) -> None:
    """The same for slow tests of the folders whose ``conftest`` imports this."""
    if request.node.get_closest_marker("slow") is not None:
        request.getfixturevalue("quick_workers")
