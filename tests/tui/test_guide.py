"""The guide through the first steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.recipe.schema import Source
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.first_steps import FirstSteps, guide_lines, hide_guide
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder

NOTHING = FirstSteps(model=False, data=False, fits=False)
FITS = FirstSteps(model=True, data=True, fits=True)


@pytest.mark.parametrize(
    ("progress", "mode", "goes_to"),
    [
        (NOTHING, "home", 0),
        (NOTHING, "models", 1),
        (NOTHING, "memory", 3),
        (NOTHING, "train", 0),
        (FirstSteps(model=True, data=False, fits=True), "home", 1),
        (FirstSteps(model=True, data=False, fits=True), "train", 1),
        (FITS, "models", 1),
        (FITS, "home", 4),
        (FITS, "train", 4),
    ],
)
def test_the_next_step_follows_the_screen_or_what_is_missing(
    progress: FirstSteps, mode: str, goes_to: int
) -> None:
    assert progress.after(mode) == goes_to


@pytest.mark.parametrize("mode", ["models", "data", "memory", "lora", "train"])
@pytest.mark.parametrize("progress", [NOTHING, FITS])
def test_the_guide_takes_two_lines_of_a_small_window(progress: FirstSteps, mode: str) -> None:
    lines = guide_lines(progress, mode, 78).plain.split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 78, lines


async def test_a_new_user_is_led_through_five_steps(private_home: Path) -> None:
    hide_guide(hidden=False)
    model = config_folder(private_home, "Qwen__Qwen2.5-0.5B")
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "First steps", "F7 goes to the next step")
        await pilot.press("f7")
        await wait_for_text(pilot, "Step 1 of 5  ▸ Model  Data", "start small", "F7 Skip")
        app.edit("model.id", str(model))
        await wait_for_text(pilot, "Step 1 of 5  ✓ Model  Data  ✓ Memory", "F7 Next")
        await pilot.press("f7")
        await wait_for_text(pilot, "Step 2 of 5  ✓ Model  ▸ Data", "Examples to learn from", "F7 Skip")
        await pilot.press("f7")
        await wait_for_text(pilot, "Step 3 of 5", "Does it fit?")
        await pilot.press("f7")
        await wait_for_text(pilot, "Step 4 of 5", "Which layers")
        await pilot.press("f7")
        await wait_for_text(pilot, "Step 5 of 5", "launch", "F7 Back")
        await pilot.press("f7")
        await wait_for_text(pilot, "Step 2 of 5")
        app.edit("data.sources", (Source(path=str(CONVERSATIONS)),))
        await wait_for_text(pilot, "✓ Data")


async def test_the_guide_can_be_hidden_and_ends_with_a_run(private_home: Path) -> None:
    hide_guide(hidden=False)
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await pilot.press("2")
        await wait_for_text(pilot, "Step 2 of 5")
        await pilot.press("f8")
        await wait_until(pilot, lambda: "Step 2 of 5" not in text_of(app))
        await pilot.press("3")
        await wait_for_text(pilot, "Assume GPU size")
        assert "Step 3 of 5" not in text_of(app)
        await pilot.press("f8")
        await wait_for_text(pilot, "Step 3 of 5")
        write_fake_run(FakeRun(name="owls", state="finished", steps=60, total=300))
        await wait_until(pilot, lambda: "Step 3 of 5" not in text_of(app))
        await pilot.press("f8")
        await wait_for_text(pilot, "The guide ended with the first run")
