"""Home, Train and Runs as pictures.

States at 80×24 and 120×40, played; each state once more at 200×60, from recorded real runs but for a million
steps. In other colors than the usual: ``test_colors.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from textual.pilot import Pilot

from bench.support.recorded_runs import ENDED, recorded_run
from qlora_tui import paths
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train import run_follower
from tests.tui.fake_runs import BEGAN, last_at, write_fake_run
from tests.tui.run_states import STATES, STATES_ONCE, three_runs, watching
from tests.tui.screen_assertions import wait_for_text

pytestmark = pytest.mark.usefixtures("same_machine")
Snap = Callable[..., bool]
SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])


@SIZES
@pytest.mark.parametrize("state", STATES)
def test_a_run(
    snap_compare: Snap, set_clock: Callable[[float], None], state: str, size: tuple[int, int]
) -> None:
    what, keys = STATES[state]
    run = write_fake_run(what)
    if what.state == "running":
        # Otherwise the pace would be that of a run whose last step was an hour ago.
        set_clock(last_at(what) + 1)
    assert snap_compare(QloraApp(), terminal_size=size, run_before=watching(run, keys=keys))


@SIZES
def test_the_list_of_runs(snap_compare: Snap, size: tuple[int, int]) -> None:
    three_runs()

    async def before(pilot: Pilot[Any]) -> None:
        await pilot.press("6")
        await wait_for_text(pilot, "tickets-a", "poems-c", "queue 1")
        await pilot.press("j", "space")
        await pilot.pause(0.3)

    assert snap_compare(QloraApp(), terminal_size=size, run_before=before)


@SIZES
def test_a_comparison(snap_compare: Snap, size: tuple[int, int]) -> None:
    three_runs()

    async def before(pilot: Pilot[Any]) -> None:
        await pilot.press("6")
        await wait_for_text(pilot, "tickets-a", "poems-c")
        await pilot.press("j", "space", "space", "space", "v")
        await wait_for_text(pilot, "3 runs compared", "Learning rate")

    assert snap_compare(QloraApp(), terminal_size=size, run_before=before)


@SIZES
def test_home_with_news(snap_compare: Snap, size: tuple[int, int]) -> None:
    three_runs()
    seen = paths.state_dir() / "seen"
    seen.touch()
    os.utime(seen, (BEGAN - 1000, BEGAN - 1000))

    async def before(pilot: Pilot[Any]) -> None:
        await wait_for_text(pilot, "while you were away", "tickets-b", "poems-c")

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


@pytest.mark.parametrize("state", STATES_ONCE)
def test_every_state_on_a_large_terminal(
    snap_compare: Snap,
    set_clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    # Read as a long one is; it makes no difference to a short one.
    monkeypatch.setattr(run_follower, "LONG_BYTES", 0)
    run, now = STATES_ONCE[state]()
    set_clock(now)
    assert snap_compare(QloraApp(), terminal_size=WIDE, run_before=watching(run))
