"""The app lists and opens runs whose files are damaged."""

from __future__ import annotations

from qlora_tui.tui.app import QloraApp
from tests.runs.damage import FILES, damaged
from tests.tui.fake_runs import TICKETS
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import settle


async def test_one_bad_byte_in_any_file_leaves_the_app_open() -> None:
    for file in FILES:
        damaged(TICKETS, "running", file, "bad UTF-8")
        damaged(TICKETS, "finished", file, "deep nesting")
        damaged(TICKETS, "finished", file, "a pipe")
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await app.switch_mode("runs")
        await wait_for_text(pilot, "? lost", "✓ finished")
        for _ in range(3 * len(FILES)):
            await pilot.press("down")
            await pilot.pause()
        await app.switch_mode("train")
        await settle(pilot)
        await app.switch_mode("home")
        await settle(pilot)
    assert app.return_code in (0, None)
