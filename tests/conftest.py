"""What every test gets: its own XDG directories, no hub, no GPU but the one it asks for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nvml_stub import install_nvml_stub

# Tests run side by side: threads that spin while they wait would take each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script's background job, and ``nohup``, start their children deaf to these, and theirs in turn.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Put back what a test's code set, such as a runner's main(): children inherit an ignored signal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Config, state, cache and the Hugging Face cache in a fresh folder; hub offline; no GPU.

    A driver library, once loaded, stays in the process: without the last, a test that played a GPU would
    leave it to those after it, and a machine with a real one would show it to all.
    """
    home = tmp_path_factory.mktemp("home")
    for variable in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{variable}_HOME", str(home / variable.lower()))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for variable in ("TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        # Set first, so that what the program sets in this process is undone after the test.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)
    install_nvml_stub(monkeypatch, "no_driver")
    return home
