"""Runs in every state that a screen shows, and how a test comes to look at one."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

from textual.pilot import Pilot

from bench.support.recorded_runs import ENDED, NO_MEMORY, NOT_A_NUMBER, recorded_run, recorded_until
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Step
from qlora_tui.runs.process import ProcessIdentity, process_identity
from qlora_tui.runs.status import read_status
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train.screen import show_run
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


STATES: dict[str, tuple[FakeRun, str]] = {
    "queued": (FakeRun(state="queued", steps=0), ""),
    "running": (FakeRun(), ""),
    "finished": (FakeRun(state="finished", steps=3000), ""),
    "failed": (FakeRun(state="failed", steps=640), ""),
    "nan": (FakeRun(state="stopped", steps=900, nan=range(700, 760), health=True), "tab tab"),
    "no_gpu": (FakeRun(state="paused", steps=90, total=200, has_gpu=False), "tab"),
}


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


def fresh() -> tuple[RunDir, float]:
    return recorded_until(0, process=process_identity())


def at_work() -> tuple[RunDir, float]:
    return recorded_until(70, process=process_identity())


def lost() -> tuple[RunDir, float]:
    run, at = recorded_until(
        70, process=ProcessIdentity(pid=1, started=1.0, boot_id=process_identity().boot_id)
    )
    return run, at + 3600


def finished() -> tuple[RunDir, float]:
    return recorded_run(), ENDED + 600


def not_a_number() -> tuple[RunDir, float]:
    return _ten_minutes_later(NOT_A_NUMBER)


def no_memory() -> tuple[RunDir, float]:
    return _ten_minutes_later(NO_MEMORY)


def _ten_minutes_later(name: str) -> tuple[RunDir, float]:
    run = recorded_run(name)
    return run, read_status(run).at + 600


def a_million() -> tuple[RunDir, float]:
    """With the steps left out that would not be read."""
    run = write_fake_run(FakeRun(steps=0, total=1_000_000, state="running"))
    with EventWriter(run.events_path) as log:
        for step in range(1, 1_000_000, 400):
            log.append(a_step(step, loss=1.2 + 1.5 * math.exp(-step / 1e5) + 0.1 * math.sin(step)))
    return run, BEGAN + 6000


def a_step(number: int, loss: float) -> Step:
    return Step(
        at=BEGAN + 40 + number * 0.005,
        step=number,
        epoch=number / 5e5,
        loss=loss,
        learning_rate=2e-4 * (1 - number / 1e6),
        grad_norm=0.4,
        tokens=number * 3500,
        tokens_per_s=2310.0,
    )


State = Callable[[], tuple[RunDir, float]]
"""Makes a run, and tells the time at which it is looked at."""
STATES_ONCE: dict[str, State] = {
    state.__name__: state for state in (fresh, at_work, lost, finished, not_a_number, no_memory, a_million)
}
