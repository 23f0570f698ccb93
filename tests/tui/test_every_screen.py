"""What holds on every screen: the way to everything else is in view, and a digit goes to its screen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_tui.recipe.schema import Source
from qlora_tui.runs.events import Health
from qlora_tui.runs.log import EventWriter
from qlora_tui.runs.status import State
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train import show_run
from tests.tui.played import BEGAN, Play, play
from tests.tui.reading import readable_model, tickets
from tests.tui.seeing import shows, until
from tests.tui.workstation import open_on

WAY_OUT = "^p Palette ? Help"


SCREENS = ["home", "models", "data", "memory", "lora", "train", "runs", "chat"]


@pytest.mark.parametrize("mode", ["models", "data", "memory", "lora", "train", "runs"])
async def test_a_digit_typed_while_a_screen_opens_goes_to_its_screen(private_home: Path, mode: str) -> None:
    app = open_on("home", model=readable_model(private_home))
    async with app.run_test(size=(80, 24)) as pilot:
        opening = app.switch_mode(mode)
        while app.screen.focused is None:
            await asyncio.sleep(0)
        app.simulate_key("7")
        await opening
        await until(pilot, lambda: app.current_mode == "chat")


@pytest.mark.parametrize("mode", SCREENS)
async def test_palette_and_help_are_in_view_on_every_screen(private_home: Path, mode: str) -> None:
    app = open_on(mode, model=readable_model(private_home))
    async with app.run_test(size=(80, 24)) as pilot:
        assert (await shows(pilot, WAY_OUT)).splitlines()[-1].count(WAY_OUT) == 1


@pytest.mark.parametrize("state", ["queued", "running", "failed", "paused", "finished", "lost"])
async def test_palette_and_help_are_in_view_beside_every_run(
    make_app: Callable[[], QloraApp], state: State
) -> None:
    run = play(Play(state=state, steps=0 if state == "queued" else 50))
    with EventWriter(run.events_path) as log:
        # Something for the key that mends.
        log.append(
            Health(at=BEGAN, kind="exploding_gradient", severity="warning", evidence="Odd.", remedy="Wait.")
        )
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await show_run(app, run)
        await shows(pilot, state if state != "running" else "training", WAY_OUT)


async def test_palette_and_help_are_in_view_beside_a_file(private_home: Path) -> None:
    app = open_on("data", model=readable_model(private_home))
    app.workbench.set("data.sources", (Source(path=str(tickets(private_home / "tickets.jsonl"))),))
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Where is parcel", WAY_OUT)
