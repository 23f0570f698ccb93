"""What tests of screens share: an app in a private home, a fixed clock and time zone."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from inspect import iscoroutinefunction as is_async
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import pytest
import textual.app
from textual import pilot
from textual._compositor import Compositor, LayoutUpdate
from textual.css import stylesheet
from textual.css.model import RuleSet
from textual.css.parse import parse
from textual.css.tokenize import tokenize_values
from textual.geometry import Region
from textual.notifications import Notification

from qlora_tui import worker
from qlora_tui.memory import budget
from qlora_tui.memory.budget import Processor
from qlora_tui.memory.recording import StepTrace
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.runs import exact_memory, status
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exact_memory import TraceStopped
from qlora_tui.runs.task_metrics.task_evaluation import TaskEvaluation
from qlora_tui.tui import app, clock, system_monitor
from qlora_tui.tui.screens import runs_and_train_commands
from qlora_tui.tui.screens.memory import screen as memory
from qlora_tui.tui.screens.train import screen as train
from qlora_tui.worker import JobStopped
from tests.support.polling import wait_for
from tests.support.quick_starts import quick_workers_if_slow
from tests.tui.fake_runs import BEGAN, GIB, TICKETS, FakeRun, write_fake_run
from tests.tui.sample_data import readable_model

__all__ = ["quick_workers_if_slow"]

FOLDER = Path(__file__).parent
NOW = BEGAN + 3600.0
"""What the clock shows unless a test sets it."""


# Before slow tests are grouped.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that draws a screen as slow: it takes a second or so, of which the suite has 600."""
    for item in items:
        if FOLDER not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        if is_async(item.obj) or "snap_compare" in item.fixturenames:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the Memory screen with its instant estimate: a trace loads torch, for each of 600 screens."""

    def stop(*args: object, **options: object) -> StepTrace:
        raise TraceStopped

    monkeypatch.setattr(exact_memory, "trace_step", stop)
    monkeypatch.setattr(memory, "TRACE_SETTLED_S", 0.0)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Show times of day in UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(autouse=True)
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimate for a CPU that computes bfloat16, whatever this machine has."""
    monkeypatch.setattr(budget, "this_processor", lambda: Processor("CPU", native_bfloat16=True))


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test need not wait a second for the next look."""
    monkeypatch.setattr(app, "SYSTEM_POLL_INTERVAL_S", 0.1)
    monkeypatch.setattr(train, "RUN_POLL_INTERVAL_S", 0.1)


@pytest.fixture(autouse=True)
def idle_means_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pilot's key or pause ends when the event loop has nothing left to run.

    Textual's own check takes a process for idle that used little processor time, which it is not while
    others have the cores: a key was pressed before the one before it was handled.
    """

    async def wait_for_idle(min_sleep: float = 0, max_sleep: float = 1) -> None:
        loop: Any = asyncio.get_running_loop()
        deadline = loop.time() + max_sleep
        idle_turns = 0
        while idle_turns < 2 and loop.time() < deadline:
            await asyncio.sleep(0)
            idle_turns = 0 if loop._ready else idle_turns + 1

    for module in (pilot, textual.app):
        monkeypatch.setattr(module, "wait_for_idle", wait_for_idle)


@pytest.fixture(autouse=True)
def unread_frames_are_not_painted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paint a frame when a test reads the screen, once: without a terminal, nothing else looks at it.

    Painting took a third of the processor time of these tests. Pictures are painted as in a terminal.
    """
    if "snap_compare" in request.fixturenames:
        return
    paint = Compositor.render_update
    painted: WeakKeyDictionary[Compositor, Any] = WeakKeyDictionary()

    def render_update(
        self: Compositor, full: bool = False, screen_stack: Any = None, simplify: bool = False
    ) -> Any:
        if simplify:
            return paint(self, full, screen_stack, simplify)
        if full:
            if self not in painted:
                painted[self] = paint(self, full, screen_stack)
            return painted[self]
        if not self._dirty_regions:
            return None
        self._dirty_regions.clear()
        return LayoutUpdate([], Region())

    def paints_again(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Compositor, *arguments: Any) -> Any:
            painted.pop(self, None)
            return change(self, *arguments)

        return changed

    monkeypatch.setattr(Compositor, "render_update", render_update)
    # Not when a region is dirty, which whoever paints a frame forgets.
    for name in ("update_widgets", "reflow", "reflow_visible"):
        monkeypatch.setattr(Compositor, name, paints_again(getattr(Compositor, name)))


class _Tokens(dict[str, Any]):
    """The variables of a theme, hashed by which they are."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # None in a dict


@cache
def _tokens_of(variables: frozenset[tuple[str, str]]) -> _Tokens:
    return _Tokens(tokenize_values(dict(variables)))


@lru_cache(4096)
def _rules_of(scope: str, css: str, read_from: Any, **options: Any) -> list[RuleSet]:
    return list(parse(scope, css, read_from, **options))


@pytest.fixture(autouse=True)
def apps_share_style_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A style sheet is parsed once for each theme, not once for each app."""
    monkeypatch.setattr(stylesheet, "tokenize_values", lambda values: _tokens_of(frozenset(values.items())))
    monkeypatch.setattr(stylesheet, "parse", _rules_of)


@pytest.fixture(autouse=True)
def notifications_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notification is there until it is read: on a loaded machine, its seconds pass between two frames."""
    monkeypatch.setattr(Notification, "time_left", 3600.0)


@pytest.fixture(autouse=True)
def old_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of these tests are months old: none is said not to respond, unless a test is about that."""
    monkeypatch.setattr(status, "SILENT_S", math.inf)


@pytest.fixture(autouse=True)
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that finds a queue standing still starts nothing, unless a test is about that."""
    monkeypatch.setattr(system_monitor, "ensure_runner", lambda: None)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set what screens take for now."""

    def set_(now: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: now)

    set_(NOW)
    return set_


class _Memory:
    total = 32 * GIB
    available = 24 * GIB


class _Disk:
    free = 70 * GIB


@pytest.fixture
def same_machine(
    private_home: Path, monkeypatch: pytest.MonkeyPatch, set_clock: Callable[[float], None]
) -> None:
    """The same paths, memory, processors and time on every machine."""
    monkeypatch.setenv("HOME", str(private_home))
    monkeypatch.setattr(psutil, "virtual_memory", _Memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Disk)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    set_clock(BEGAN + 6000)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: files are named as the user standing beside them would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(private_home: Path) -> str:
    """A model whose tokenizer can be read."""
    return readable_model(private_home)


@pytest.fixture
def three_runs() -> list[RunDir]:
    wide = replace_setting(replace_setting(TICKETS, "lora.rank", 64), "training.learning_rate", 1e-4)
    return [
        write_fake_run(FakeRun(name="tickets-a", state="finished", steps=300, total=300, began=BEGAN - 1000)),
        write_fake_run(
            FakeRun(name="tickets-b", state="failed", steps=120, total=300, began=BEGAN - 2000, recipe=wide)
        ),
        write_fake_run(FakeRun(name="poems-c", state="lost", steps=60, total=300, began=BEGAN - 3000)),
    ]


@pytest.fixture
def endless_measurements(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that measure runs, which do not end unless they are killed."""
    children: list[subprocess.Popen[bytes]] = []

    def sleeper(argv: list[str], **how: Any) -> subprocess.Popen[bytes]:
        if "qlora_tui.engine.data_service:count_data" in argv:
            return subprocess.Popen(argv, **how)
        children.append(subprocess.Popen(["sleep", "600"], **how))
        return children[-1]

    slow = SimpleNamespace(Popen=sleeper, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(worker, "subprocess", slow)
    return children


@pytest.fixture
def answers_until_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison of answers that stands at the third of 14 prompts until it is stopped."""

    def evaluate(
        run: RunDir, progress: Callable[[int, int], None], should_stop: Callable[[], bool]
    ) -> TaskEvaluation:
        progress(3, 14)
        wait_for(should_stop)
        raise JobStopped

    monkeypatch.setattr(runs_and_train_commands, "evaluate_task", evaluate)
