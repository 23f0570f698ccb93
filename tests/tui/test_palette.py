"""The command palette finds commands that work, and what has a name; what was used last comes first."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.command import Command, CommandList
from textual.pilot import Pilot

from qlora_tui.settings import Settings, load_settings
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.ui_state import add_recent
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_machine")]


async def use(pilot: Pilot[None], query: str, title: str) -> None:
    """Type a query in the palette, and choose the line that is then first."""
    await pilot.press("ctrl+p")
    await wait_for_text(pilot, "Search for commands")
    await pilot.press(*query)
    await wait_until(pilot, lambda: lines_of(pilot)[:1] == [title])
    await pilot.press("enter")
    await wait_until(pilot, lambda: len(pilot.app.screen_stack) == 1)


def lines_of(pilot: Pilot[None]) -> list[str]:
    """The titles of the palette's lines."""
    options = pilot.app.screen.query_one(CommandList).options
    return [option.hit.text or "" for option in options if isinstance(option, Command)]


async def test_a_run_a_model_and_a_preset_are_found_by_name_and_come_first_afterwards(
    private_home: Path,
) -> None:
    run = write_fake_run(FakeRun(name="tickets", state="finished", steps=10, total=10))
    folder = config_folder(private_home, "Qwen__Qwen2.5-7B")
    app = QloraApp(Settings(model_folders=(str(folder.parent),)))
    async with app.run_test(size=(100, 40)) as pilot:
        await use(pilot, "tickets", "Run: tickets")
        await wait_for_text(pilot, run.name, "finished")
        await use(pilot, "qwen2.5-7b", "Model: Qwen2.5-7B")
        await wait_until(pilot, lambda: app.workbench.recipe.model.id == str(folder))
        await use(pilot, "preset: quality", "Preset: quality")
        await wait_until(pilot, lambda: app.workbench.preset == "quality")
        await pilot.press("ctrl+p")
        latest = ["Preset: quality", "Model: Qwen2.5-7B", "Run: tickets"]
        await wait_until(pilot, lambda: lines_of(pilot)[:3] == latest)


async def test_a_theme_is_shown_under_the_cursor_and_a_command_opens_its_screen() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        before = app.theme
        await pilot.press("ctrl+p", *"theme: ember")
        await wait_until(pilot, lambda: app.theme == "ember")
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.theme == before)
        assert load_settings().theme != "ember"
        await use(pilot, "theme: ember", "Theme: ember")
        await wait_until(pilot, lambda: app.theme == load_settings().theme == "ember")
        await use(pilot, "rerun", "Rerun")
        await wait_until(pilot, lambda: app.current_mode == "runs")


async def test_only_what_does_something_now_is_offered_and_what_ends_a_run_is_not_first() -> None:
    add_recent("palette", "command:train.stop")
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5", "ctrl+p")
        await wait_until(pilot, lambda: "Launch" in lines_of(pilot))
        assert "Stop and save" not in text_of(app)
        await pilot.press("escape")
        write_fake_run(FakeRun(name="tickets", steps=10))
        await wait_for_text(pilot, "z Pause")
        await pilot.press("ctrl+p")
        await wait_until(pilot, lambda: "Stop and save" in lines_of(pilot))
        assert "Launch" not in lines_of(pilot)
        assert lines_of(pilot)[0] == "Checkpoint"
        await wait_for_text(pilot, "Save a checkpoint now.")
        row = next(line for line in text_of(app).splitlines() if "Checkpoint" in line)
        assert row.rstrip("│ ").endswith("K") and "Save a checkpoint now." in row
