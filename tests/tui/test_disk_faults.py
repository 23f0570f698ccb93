"""A disk that cannot be written is a notification in the app, not its end."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from textual.css.query import NoMatches
from textual.pilot import WaitForScreenTimeout

from qlora_tui.tui.app import QloraApp
from tests.tui.screen_assertions import wait_for_text, wait_until


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/state/file")


async def full_in_worker() -> None:
    full()


async def test_a_worker_that_cannot_write_is_reported_once() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "balanced")
        for _ in range(3):
            app.run_worker(full_in_worker())
            await pilot.pause()
        await wait_until(pilot, lambda: bool(app._notifications))
        (note,) = app._notifications
        assert note.message.startswith("No space left on the disk: /state/file")
        assert app.is_running
    assert app.disk_faults.ended_by is None


async def test_a_full_disk_in_a_callback_ends_the_app() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "balanced")
        app.call_later(full)
        with suppress(WaitForScreenTimeout, NoMatches):
            await pilot._wait_for_screen(timeout=0.2)
    assert app.return_code == 1
    assert app.disk_faults.ended_by is not None
    assert app.disk_faults.ended_by.title == "No space left on the disk"


async def test_any_other_error_still_ends_the_app() -> None:
    app = QloraApp()

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with app.run_test(size=(80, 24)) as pilot:
            await wait_for_text(pilot, "balanced")
            app.call_later(broken)
            await pilot.pause()
