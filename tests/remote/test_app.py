"""The app on a box: it shows the box's runs, asks there, and says when the box does not answer."""

from __future__ import annotations

import signal

import pytest

from qlora_tui.remote.link import Link
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.modals.dialogs import ErrorScreen
from qlora_tui.tui.widgets.bars import TopBar
from tests.remote.sshd import FakeBox
from tests.remote.test_link import link, run_there

__all__ = ["link", "run_there"]
pytestmark = pytest.mark.slow


async def test_the_app_shows_the_box_and_says_when_it_is_silent(
    link: Link, run_there: RunDir, box: FakeBox
) -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:

        async def until(what: object) -> None:
            for _ in range(600):
                if what():  # type: ignore[operator]
                    return
                await pilot.pause(0.05)
            raise AssertionError("waited in vain")

        await until(lambda: app.system_status.box == "box" and app.system_status.active_or_last)
        assert app.system_status.active_or_last is not None
        assert app.system_status.active_or_last.id == run_there.id
        assert app.system_status.no_gpu is not None and app.system_status.host is not None
        assert any("box" in option for option in TopBar.status_options(app.system_status))
        await pilot.press("d")
        await until(lambda: isinstance(app.screen, ErrorScreen))
        await pilot.press("escape")
        box.cut(signal.SIGSTOP)
        await until(lambda: app.has_class("-away"))
        assert "has not answered for" in TopBar.status_options(app.system_status)[0]
        box.cut(signal.SIGCONT)
        await until(lambda: not app.has_class("-away"))
