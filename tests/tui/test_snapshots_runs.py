"""Home, Train and Runs as pictures.

States at 80×24 and 120×40; each state once more at 200×60, from a recorded real run where it was ever in that
state. In other colours than the usual: ``test_colours.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from textual.pilot import Pilot

from qlora_tui import paths
from qlora_tui.recipe.fields import with_value
from qlora_tui.runs import queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Step
from qlora_tui.runs.log import EventWriter
from qlora_tui.runs.process import ProcessMark, mark
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens import train_follow
from qlora_tui.tui.screens.train import show_run
from tests.tui.played import BEGAN, GIB, TICKETS, Play, play
from tests.tui.recorded import ENDED, recorded_run, recorded_until
from tests.tui.seeing import shows

Snap = Callable[..., bool]
SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])


class _Memory:
    total = 32 * GIB


@pytest.fixture(autouse=True)
def same_machine(
    private_home: Path, monkeypatch: pytest.MonkeyPatch, set_clock: Callable[[float], None]
) -> None:
    """The same paths, memory, processors and time on every machine."""
    monkeypatch.setenv("HOME", str(private_home))
    monkeypatch.setattr(psutil, "virtual_memory", _Memory)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    set_clock(BEGAN + 6000)


def watching(run: RunDir, *texts: str, keys: str = "") -> Callable[[Pilot[Any]], Awaitable[None]]:
    async def before(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, QloraApp)
        await show_run(app, run)
        await shows(pilot, run.id, *texts)
        for key in keys.split():
            await pilot.press(key)
        await pilot.pause(0.3)

    return before


STATES: dict[str, tuple[Play, str]] = {
    "queued": (Play(state="queued", steps=0), ""),
    "running": (Play(), ""),
    "finished": (Play(state="finished", steps=3000), ""),
    "failed": (Play(state="failed", steps=640), ""),
    "nan": (Play(state="stopped", steps=900, nan=range(700, 760), health=True), "tab tab"),
    "no_gpu": (Play(state="paused", steps=90, total=200, card=False), "tab"),
}


@SIZES
@pytest.mark.parametrize("state", STATES)
def test_a_run(snap_compare: Snap, state: str, size: tuple[int, int]) -> None:
    what, keys = STATES[state]
    run = play(what)
    assert snap_compare(QloraApp(), terminal_size=size, run_before=watching(run, keys=keys))


def three_runs() -> None:
    wide = with_value(with_value(TICKETS, "lora.rank", 64), "training.learning_rate", 1e-4)
    play(Play(name="tickets-a", state="finished", steps=300, total=300, began=BEGAN - 1000))
    play(Play(name="tickets-b", state="failed", steps=120, total=300, began=BEGAN - 2000, recipe=wide))
    play(Play(name="poems-c", state="lost", steps=160, total=300, nan=range(90, 99), began=BEGAN - 90_000))
    queue.enqueue(play(Play(name="next-one", state="queued", steps=0)))


@SIZES
def test_the_list_of_runs(snap_compare: Snap, size: tuple[int, int]) -> None:
    three_runs()

    async def before(pilot: Pilot[Any]) -> None:
        await pilot.press("6")
        await shows(pilot, "tickets-a", "poems-c", "queue 1")
        await pilot.press("j", "space")
        await pilot.pause(0.3)

    assert snap_compare(QloraApp(), terminal_size=size, run_before=before)


@SIZES
def test_a_comparison(snap_compare: Snap, size: tuple[int, int]) -> None:
    three_runs()

    async def before(pilot: Pilot[Any]) -> None:
        await pilot.press("6")
        await shows(pilot, "tickets-a", "poems-c")
        await pilot.press("j", "space", "space", "space", "v")
        await shows(pilot, "3 runs compared", "Learning rate")

    assert snap_compare(QloraApp(), terminal_size=size, run_before=before)


@SIZES
def test_home_with_news(snap_compare: Snap, size: tuple[int, int]) -> None:
    three_runs()
    seen = paths.state_dir() / "seen"
    seen.touch()
    os.utime(seen, (BEGAN - 1000, BEGAN - 1000))

    async def before(pilot: Pilot[Any]) -> None:
        await shows(pilot, "while you were away", "tickets-b", "poems-c")

    assert snap_compare(QloraApp(), terminal_size=size, run_before=before)


@SIZES
def test_a_recorded_real_run(
    snap_compare: Snap, set_clock: Callable[[float], None], size: tuple[int, int]
) -> None:
    run = recorded_run()
    set_clock(ENDED + 600)
    assert snap_compare(
        QloraApp(), terminal_size=size, run_before=watching(run, "finished", "step 81/81", keys="tab")
    )


WIDE = (200, 60)


def fresh() -> tuple[RunDir, float]:
    return recorded_until(0, process=mark())


def at_work() -> tuple[RunDir, float]:
    return recorded_until(70, process=mark())


def lost() -> tuple[RunDir, float]:
    run, at = recorded_until(70, process=ProcessMark(pid=1, started=1.0, boot_id=mark().boot_id))
    return run, at + 3600


def finished() -> tuple[RunDir, float]:
    return recorded_run(), ENDED + 600


def not_a_number() -> tuple[RunDir, float]:
    return play(STATES["nan"][0]), BEGAN + 6000


def no_memory() -> tuple[RunDir, float]:
    return play(STATES["failed"][0]), BEGAN + 6000


def a_million() -> tuple[RunDir, float]:
    """With the steps left out that would not be read."""
    run = play(Play(steps=0, total=1_000_000, state="running"))
    with EventWriter(run.events_path) as log:
        for step in range(1, 1_000_000, 400):
            log.append(a_step(step, loss=1.2 + 1.5 * math.exp(-step / 1e5) + 0.1 * math.sin(step)))
    return run, BEGAN + 6000


def a_step(number: int, loss: float) -> Step:
    return Step(
        at=BEGAN + 40 + number * 0.005,
        step=number,
        epoch=number / 5e5,
        loss=loss,
        learning_rate=2e-4 * (1 - number / 1e6),
        grad_norm=0.4,
        tokens=number * 3500,
        tokens_per_s=2310.0,
    )


State = Callable[[], tuple[RunDir, float]]
"""Makes a run, and tells the time at which it is looked at."""
STATES_ONCE: dict[str, State] = {
    state.__name__: state for state in (fresh, at_work, lost, finished, not_a_number, no_memory, a_million)
}


@pytest.mark.parametrize("state", STATES_ONCE)
def test_every_state_on_a_large_terminal(
    snap_compare: Snap,
    set_clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    # Read as a long one is; it makes no difference to a short one.
    monkeypatch.setattr(train_follow, "LONG_BYTES", 0)
    run, now = STATES_ONCE[state]()
    set_clock(now)
    assert snap_compare(QloraApp(), terminal_size=WIDE, run_before=watching(run))
