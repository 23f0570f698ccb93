"""Leaving a screen while its work goes on."""

from __future__ import annotations

import asyncio

from textual.widget import Widget

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


async def test_news_that_arrives_while_the_app_quits_looks_for_no_widget() -> None:
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
