"""A trainer that does not respond is said not to, on each screen that shows its run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from qlora_tui.runs import status
from qlora_tui.runs.view import RunView
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train.run_follower import RunSnapshot
from qlora_tui.tui.screens.train.run_panels import state_line
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_for_text


@pytest.mark.parametrize("mode", ["train", "runs"])
async def test_a_silent_trainer_is_shown_as_not_responding(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(status, "SILENT_S", 30.0)
    write_fake_run(FakeRun(name="tickets", state="running", steps=60, total=300))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await app.switch_mode(mode)
        await wait_for_text(pilot, "Not responding")


def test_a_queued_run_says_its_runner_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "describe_runner", lambda: "The runner is suspended.")
    run = write_fake_run(FakeRun(name="tickets", state="queued"))
    snapshot = cast(
        RunSnapshot, SimpleNamespace(view=RunView(run), status=status.read_status(run), health=())
    )
    assert "The runner is suspended." in state_line(snapshot).plain
