"""Leaving a screen while its work continues."""

from __future__ import annotations

import asyncio
import gc
import warnings
from pathlib import Path

from textual import work
from textual.widget import Widget

import qlora_tui.tui
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


async def test_replaced_work_leaves_no_coroutine() -> None:
    done: list[int] = []

    class Numbers(Widget):
        @work(exclusive=True)
        async def number(self, number: int) -> None:
            done.append(number)

    with warnings.catch_warnings(record=True) as warnings_seen:
        warnings.simplefilter("always")
        async with open_on("data").run_test() as pilot:
            numbers = Numbers()
            await pilot.app.screen.query_one("#data-body").mount(numbers)
            for number in range(3):
                numbers.number(number)
            await pilot.pause()
            gc.collect()
    assert done == [2]
    assert not [warning for warning in warnings_seen if "never awaited" in str(warning.message)]


def test_every_worker_is_a_decorated_method() -> None:
    """A coroutine passed to ``run_worker`` and cancelled early would never be awaited."""
    sources = [path.read_text() for path in Path(qlora_tui.tui.__path__[0]).rglob("*.py")]
    assert sum(source.count("@work") for source in sources) > 10
    assert not [source for source in sources if "run_worker(" in source]
