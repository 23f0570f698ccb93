"""Leaving a screen while its work continues."""

from __future__ import annotations

import asyncio
import gc
import re
import warnings
from pathlib import Path

from textual.widget import Widget

import qlora_tui.tui
from qlora_tui.tui.deferred import DeferredWork
from qlora_tui.tui.screens.base import WorkScreen
from tests.tui.workstation import open_on


class _Last(Widget):
    """A widget that says when the widgets of its screen are going."""

    def __init__(self) -> None:
        super().__init__()
        self.going = asyncio.Event()

    async def on_unmount(self) -> None:
        self.going.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_events_during_quitting_query_no_widget() -> None:
    app = open_on("data")
    looked = False
    async with app.run_test() as pilot:
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, WorkScreen)
        last = _Last()
        await screen.query_one("#data-body").mount(last)

        async def late_report() -> None:
            nonlocal looked
            await last.going.wait()
            looked = True
            screen.query_one("#data-body")

        screen.run_worker(late_report())
        await pilot.pause()
    assert last.going.is_set()
    assert not looked


async def test_replaced_deferred_work_leaves_no_coroutine() -> None:
    done: list[int] = []

    async def work(number: int) -> None:
        done.append(number)

    with warnings.catch_warnings(record=True) as warnings_seen:
        warnings.simplefilter("always")
        async with open_on("data").run_test() as pilot:
            await pilot.pause()
            for number in range(3):
                pilot.app.screen.run_worker(DeferredWork(work, number), exclusive=True, group="numbers")
            await pilot.pause()
            gc.collect()
    assert done == [2]
    assert not [warning for warning in warnings_seen if "never awaited" in str(warning.message)]


def test_every_worker_is_given_its_work_that_way() -> None:
    given = [
        call
        for path in Path(qlora_tui.tui.__path__[0]).rglob("*.py")
        for call in re.findall(r"run_worker\((\w+)", path.read_text())
    ]
    assert len(given) > 10
    assert set(given) == {"DeferredWork"}
