"""The dialog with suggested settings: what is ticked is applied, and can be undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from textual.pilot import Pilot

from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Source
from qlora_tui.runs.suggestions import Suggestion
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen, ErrorScreen
from qlora_tui.tui.screens.train import suggest_dialog
from qlora_tui.tui.screens.train.suggest_dialog import SuggestScreen
from qlora_tui.tui.widgets.controls import ViList
from tests.tui.sample_data import readable_model, tickets
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import go_to, open_on, settle


def app_with_data(home: Path) -> QloraApp:
    app = open_on("home", model=readable_model(home))
    app.workbench.set("data.sources", (Source(path=str(tickets(home / "tickets.jsonl", 80))),))
    return app


async def open_suggestions(pilot: Pilot[Any]) -> None:
    await go_to(pilot, "5", "Sequence length")
    await pilot.press("f")
    await wait_for_text(pilot, "Suggested settings", "1,024 → 512", "Learning rate")


@pytest.mark.slow
async def test_what_is_ticked_is_applied_at_once_and_can_be_undone(tmp_path: Path) -> None:
    app = app_with_data(tmp_path)
    before = app.workbench.recipe
    async with app.run_test(size=(120, 40)) as pilot:
        await open_suggestions(pilot)
        await pilot.press("space")
        list_ = app.screen.query_one(ViList)
        await wait_until(pilot, lambda: str(list_.options[0].prompt).startswith("○"))
        # Enter waits until the others are derived for the length that stays.
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.workbench.recipe != before)
        recipe = app.workbench.recipe
        assert recipe.data.max_length == before.data.max_length
        assert recipe.training.epochs == 3
        assert recipe.effective_batch < before.effective_batch
        await pilot.press("u")
        assert app.workbench.recipe == before

        await pilot.press("f")
        await wait_for_text(pilot, "1,024 → 512")
        await pilot.press("escape")
        assert app.workbench.recipe == before and not isinstance(app.screen, SuggestScreen)


@pytest.mark.slow
@pytest.mark.usefixtures("same_machine", "here")
@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
def test_looks(snap_compare: Callable[..., bool], private_home: Path, size: tuple[int, int]) -> None:
    async def before(pilot: Pilot[Any]) -> None:
        await open_suggestions(pilot)
        await settle(pilot)

    assert snap_compare(app_with_data(private_home), terminal_size=size, run_before=before)


async def test_without_a_model_the_dialog_says_what_is_missing() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5", "f")
        await wait_for_text(pilot, "Nothing to suggest", "a model and data")
        await pilot.press("escape")
        assert len(app.screen_stack) == 1


@pytest.mark.slow
async def test_a_dialog_that_fails_under_another_window_closes_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_covered = Event()

    def refuse(*_: object) -> tuple[Suggestion, ...]:
        is_covered.wait(10)
        raise UserError("No suggestions", what="The data were deleted.")

    app = app_with_data(tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await open_suggestions(pilot)
        dialog = app.screen
        monkeypatch.setattr(suggest_dialog, "suggest", refuse)
        await pilot.press("space")
        await app.push_screen(ConfirmScreen("Above", "", harmless=True))
        is_covered.set()
        await wait_until(pilot, lambda: isinstance(app.screen, ErrorScreen))
        await pilot.press("escape")
        assert "Above" in text_of(app)
        await pilot.press("escape")
        await wait_until(pilot, lambda: dialog not in app.screen_stack)
        assert len(app.screen_stack) == 1
