"""Runs in every state that a screen shows, and how a test comes to look at one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from textual.pilot import Pilot

from qlora_tui.recipe.fields import replace_setting
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import ProcessIdentity, process_identity
from qlora_tui.runs.status import read_status
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train.screen import show_run
from screenshots.recorded_runs import NO_MEMORY, NOT_A_NUMBER, recorded_run, recorded_until
from tests.tui.fake_runs import BEGAN, TICKETS, FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_for_text


def watching(run: RunDir, *texts: str, keys: str = "") -> Callable[[Pilot[Any]], Awaitable[None]]:
    async def before(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, QloraApp)
        await show_run(app, run)
        await wait_for_text(pilot, run.id, *texts)
        for key in keys.split():
            await pilot.press(key)
        await pilot.pause(0.3)

    return before


def three_runs() -> None:
    wide = replace_setting(replace_setting(TICKETS, "lora.rank", 64), "training.learning_rate", 1e-4)
    write_fake_run(FakeRun(name="tickets-a", state="finished", steps=300, total=300, began=BEGAN - 1000))
    write_fake_run(
        FakeRun(name="tickets-b", state="failed", steps=120, total=300, began=BEGAN - 2000, recipe=wide)
    )
    write_fake_run(
        FakeRun(name="poems-c", state="lost", steps=160, total=300, nan=range(90, 99), began=BEGAN - 90_000)
    )
    run_queue.enqueue(write_fake_run(FakeRun(name="next-one", state="queued", steps=0)))


def lost() -> tuple[RunDir, float]:
    run, at = recorded_until(70, process=ProcessIdentity(pid=1, boot_id=process_identity().boot_id))
    return run, at + 3600


def not_a_number() -> tuple[RunDir, float]:
    return _ten_minutes_later(NOT_A_NUMBER)


def no_memory() -> tuple[RunDir, float]:
    return _ten_minutes_later(NO_MEMORY)


def _ten_minutes_later(name: str) -> tuple[RunDir, float]:
    run = recorded_run(name)
    return run, read_status(run).at + 600
