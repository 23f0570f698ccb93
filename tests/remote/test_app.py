"""The app on a box: it shows the box's runs, asks there, and says when the box does not answer."""

from __future__ import annotations

import os
import signal
import time

import pytest

from qlora_tui.locks import hold_folder
from qlora_tui.remote.link import Link
from qlora_tui.runs import actions, control
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.modals.dialogs import ErrorScreen
from qlora_tui.tui.widgets.bars import TopBar
from tests.remote.sshd import FakeBox
from tests.remote.test_link import link, on_box, run_there
from tests.tui.screen_assertions import wait_for_text, wait_until

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


async def test_stop_and_delete_ask_here_and_act_on_the_box(
    link: Link, run_there: RunDir, box: FakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = on_box(box, monkeypatch)
    write_status(training, Status(state="running", at=time.time(), process=process_identity()))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_until(pilot, lambda: app.system_status.active is not None)
        await pilot.press("5")
        await wait_until(pilot, lambda: getattr(app.screen, "state", "") == "running")
        await pilot.press("Z")
        await wait_for_text(pilot, "Stop the run?")
        await pilot.press("y")
        await wait_until(pilot, lambda: control.pending_ending(training) == "stop")
        await pilot.press("6", "down")
        await wait_for_text(pilot, run_there.id)
        handle = hold_folder(run_there.path)
        assert handle is not None
        box.cut(signal.SIGSTOP)
        # The keys work while the box is asked, and ask it once.
        await pilot.press("D", "D")
        await wait_for_text(pilot, "The last action is still in progress")
        await pilot.press("escape")
        box.cut(signal.SIGCONT)
        await wait_for_text(pilot, "Delete the run?", "its adapter is loaded")
        assert run_there.path.exists()
        await pilot.press("y")
        await wait_until(pilot, lambda: app.deleted_runs == [run_there.id])
        assert not run_there.path.exists()
        os.close(handle)
        assert [each.run.id for each in actions.trashed_runs()] == [run_there.id]
        assert actions.trash_bytes() > 1000
        await pilot.press("u")
        await wait_until(pilot, run_there.path.exists)
        await pilot.press("up", "D")
        await wait_for_text(pilot, "The run has not ended")
    assert training.path.exists()
