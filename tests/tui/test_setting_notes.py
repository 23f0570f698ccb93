"""Notes on the settings beside the form of Train."""

from __future__ import annotations

import pytest

from qlora_tui.recipe.fields import fields
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train.setting_notes import SettingNotes
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until

FIELDS = [field for field in fields().values() if field.section == "training"]


@pytest.mark.parametrize("path", ["training.epochs", FIELDS[-1].path])
def test_notes_turn_to_the_page_of_the_selected_setting(path: str) -> None:
    notes = SettingNotes(FIELDS)
    notes.select(fields()[path])
    lines = [line.plain for line in notes.draw(60, 20)]
    (marked,) = [line for line in lines if line.startswith("▸")]
    assert marked.endswith(path)
    assert 1 < len(lines) <= 20 and all(len(line) <= 60 for line in lines)


async def test_train_explains_settings_in_a_large_window_only() -> None:
    async with QloraApp().run_test(size=(200, 60)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "What the settings do", "▸ Name  name")
        await pilot.press("j", "j")
        await wait_for_text(pilot, "▸ Gradient accumulation  training.gradient_accumulation")
        await pilot.resize_terminal(120, 40)
        await wait_until(pilot, lambda: "What the settings do" not in text_of(pilot.app))
        await wait_for_text(pilot, "Checks")
