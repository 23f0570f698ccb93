"""Fixtures of every test: private XDG directories, no hub, no GPU unless the test simulates one.

Also which tests run in one worker of pytest-xdist (``--dist loadgroup``), and in what order.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

from qlora_tui.catalog import described
from qlora_tui.gpu import torch_env
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.memory import traces
from qlora_tui.settings import GPU_VARIABLE
from tests.support.descriptions import Descriptions, descriptions, quick_descriptions
from tests.support.nvml_stub import install_nvml_stub
from tests.support.quick_starts import (
    IMPORTS,
    SHARED,
    quick_confined,
    quick_workers,
    started,
    worker_server,
)
from tests.support.trainer_processes import quick_trainers, trainers

__all__ = [
    "descriptions",
    "quick_confined",
    "quick_descriptions",
    "quick_trainers",
    "quick_workers",
    "trainers",
    "worker_server",
]

_collection = ExitStack()
_HOME_NUMBERS = itertools.count()
ALL_SLOW = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.slow\b", re.MULTILINE)
_LONGEST_ID = 60

# Tests run in parallel: OpenMP threads that spin while waiting would take cores from other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Property tests run on a machine that may be busy: no example has a deadline.
settings.register_profile(
    "busy", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")

# A script's background jobs and ``nohup`` ignore these signals, and their children inherit that.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of groups below: pytest-xdist would begin with those of many tests, slow or fast.

    Start what its workers share.
    """
    config.option.loadscopereorder = False
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        shared = ExitStack()
        folder = shared.enter_context(TemporaryDirectory(prefix="fork-servers-"))
        shared.enter_context(started(Path(folder), *IMPORTS))
        os.environ[SHARED] = folder
        config.add_cleanup(shared.close)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Collect no garbage while tests are collected: it took a quarter of that time and freed nothing.

    Workers of pytest-xdist, which import torch anyway, leave its compiler aside as the program does.
    """
    gc.disable()
    if hasattr(session.config, "workerinput") and session.config.option.markexpr != "not slow":
        _collection.enter_context(faster_imports())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave modules of which all tests are slow out of fast runs: importing them takes seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return True if ALL_SLOW.search(collection_path.read_text()) else None


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long text or bytes by its argument and length: workers send the id of a test several times."""
    if isinstance(val, str | bytes) and len(val) > _LONGEST_ID:
        return f"{argname} of {len(val)}"
    return None


# Before pytest-xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests of a module, which share its fixtures and caches.

    Slow groups come first, the largest before the others, then fast ones; what is left at the end takes
    milliseconds, so that no worker waits for another.
    """
    sizes: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            group = item.nodeid.partition("::")[0]
            if item.get_closest_marker("slow") is not None:
                group += " slow"
            item.add_marker(pytest.mark.xdist_group(group))
        sizes[_group(item)] += 1
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, -sizes[_group(item)]))


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0] if marker.args else marker.kwargs["name"])


def pytest_collection_finish() -> None:
    """Leave modules and tests, a million objects, out of garbage collections, and make these rarer.

    Collections took a fifth of the processor time of tests that draw screens.
    """
    _collection.close()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    """Leave everything out of the five collections with which pytest ends: they took seconds."""
    gc.freeze()


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore signal handlers that the tested code set: children inherit ignored signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def private_home(private_environment: Path) -> Path:
    """The folder of config, state and caches; what the program keeps there it creates itself."""
    private_environment.mkdir(mode=0o700, exist_ok=True)
    return private_environment


@pytest.fixture(autouse=True)
def private_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put config, state, cache and the Hugging Face cache in a folder to be created; no Hub, no GPU, no WSL2.

    A driver library stays loaded in the process. Without the stub here, a GPU that one test simulates would
    be seen by later tests, and so would a real one.
    """
    homes = tmp_path_factory.getbasetemp() / "homes"
    homes.mkdir(exist_ok=True)
    # mktemp would look through all earlier ones: of thousands, that took seconds.
    home = homes / str(next(_HOME_NUMBERS))
    for variable in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{variable}_HOME", str(home / variable.lower()))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for variable in ("TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES", GPU_VARIABLE):
        # Set first, so that what the program sets in this process is undone after the test.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    # Or argparse looks on the disk for a translation of each of its words.
    monkeypatch.setenv("LANGUAGE", "C")
    # A terminal of 256 colors, wherever the tests run.
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)
    install_nvml_stub(monkeypatch, "no_driver")
    for path in ("_KERNEL_RELEASE", "_GPU_OF_WINDOWS"):
        monkeypatch.setattr(torch_env, path, home / "not WSL2")
    return home


@pytest.fixture(scope="session", autouse=True)
def environment_of_modules(
    tmp_path_factory: pytest.TempPathFactory, descriptions: Descriptions
) -> Iterator[None]:
    """Keep fixtures of modules from the user's folders, from a GPU, and from a stub loaded earlier.

    They describe models as tests do, once in a session.
    """
    home = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("CONFIG", "STATE", "CACHE"):
            patch.setenv(f"XDG_{variable}_HOME", str(home / variable.lower()))
        install_nvml_stub(patch, "no_driver")
        patch.setattr(described, "run_job", lambda job, configs, **how: descriptions.run(configs, how))
        yield


@pytest.fixture(autouse=True)
def no_known_traces() -> Iterator[None]:
    """Let a test estimate by the formula, whatever the test before has traced."""
    yield
    traces.forget()


@pytest.fixture(autouse=True)
def skip_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fsync in this process return at once.

    It only matters for a power cut, which tests simulate from the recorded calls. Waiting for the disk took
    half the time of some tests.
    """
    monkeypatch.setattr(os, "fsync", os.fstat)  # which rejects a closed descriptor too


@pytest.fixture(autouse=True)
def keep_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process its priority where a test runs a worker's code in it.

    A process cannot raise its priority again: all later tests would wait for those of other processes.
    """
    monkeypatch.setattr(os, "nice", lambda increment: 0)
