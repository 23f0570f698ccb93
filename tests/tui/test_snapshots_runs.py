"""Home, Train and Runs as pictures, at two sizes: fresh, running, finished, failed, NaN, without a card."""

from __future__ import annotations

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
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train import show_run
from tests.tui.played import BEGAN, GIB, TICKETS, Play, play
from tests.tui.recorded import ENDED, recorded_run
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
