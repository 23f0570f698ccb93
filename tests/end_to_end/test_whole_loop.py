"""The whole loop by hand, in the app, with real processes: pick, data, estimate, LoRA, train, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.content import Content
from textual.widgets import Input, Static

from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.status import read_status
from qlora_tui.runs.view import RunView
from qlora_tui.settings import Settings
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.screen import ChatScreen
from qlora_tui.tui.screens.chat.turn import AdapterAnswer
from tests.tui.screen_assertions import text_of, wait_until


def part_of(app: QloraApp, selector: str) -> str:
    shown = app.screen.query_one(selector, Static).visual
    return shown.plain if isinstance(shown, Content) else str(shown)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
async def test_a_user_gets_from_model_to_chat_with_the_adapter(tiny_model: Path, conversations: Path) -> None:
    app = QloraApp(Settings(model_folders=(str(tiny_model.parent),)))
    async with app.run_test(size=(120, 40)) as pilot:

        def recipe_of() -> Any:
            return app.workbench.recipe

        # Pick a model.
        await pilot.press("1")
        await wait_until(pilot, lambda: "tiny-llama" in text_of(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: recipe_of().model.id.endswith("tiny-llama"))

        # Choose data, and see a row as the model will.
        await pilot.press("2", "o")
        await wait_until(pilot, lambda: app.screen.query("#path-input"))
        app.screen.query_one("#path-input", Input).value = str(conversations)
        await pilot.press("enter")
        await wait_until(pilot, lambda: recipe_of().data.sources)
        await wait_until(pilot, lambda: "the fox is red" in part_of(app, "#sample"))

        # Settings that train in a moment.
        for path, value in {
            "data.max_length": 128,
            "training.gradient_accumulation": 1,
            "training.epochs": 4.0,
            "training.optimizer": "adamw",
            "training.learning_rate": 1e-3,
        }.items():
            app.edit(path, value)

        # See that it fits.
        await pilot.press("3")
        await wait_until(pilot, lambda: "NF4" in part_of(app, "#bars") and "fits" in part_of(app, "#bars"))

        # Change what LoRA does: half the rank, and not every module.
        await pilot.press("4")
        await wait_until(pilot, lambda: "every kind" in text_of(app))
        rank = recipe_of().lora.rank
        await pilot.press("R")
        assert recipe_of().lora.rank == rank // 2
        await pilot.press("down", "space")
        await wait_until(pilot, lambda: recipe_of().lora.target_modules != ("all-linear",))

        # Launch, and watch the loss come in.
        await pilot.press("5")
        await wait_until(pilot, lambda: "Launch" in text_of(app))
        await pilot.press("t")
        await wait_until(pilot, all_runs)
        run: RunDir = all_runs()[0]
        await wait_until(pilot, lambda: read_status(run).step > 0)
        await wait_until(pilot, lambda: "step" in text_of(app) and "loss" in text_of(app))
        await wait_until(pilot, lambda: read_status(run).state == "finished")
        view = RunView(run)
        view.refresh()
        assert view.evaluations[-1].loss is not None and view.evaluations[0].loss is not None
        assert view.evaluations[-1].loss < view.evaluations[0].loss
        assert run.recipe().lora == recipe_of().lora

        # Talk to base and adapter side by side.
        await pilot.press("7")
        await wait_until(
            pilot, lambda: isinstance(app.screen, ChatScreen) and app.screen.conversation.source is not None
        )
        field = app.screen.query_one(PromptBox)
        field.focus()
        field.text = "what is the colour of fox 3?"
        await pilot.press("enter")
        answers = app.screen.query(AdapterAnswer)
        await wait_until(
            pilot,
            lambda: len(answers) == 2 and all(" tok" in str(one.border_title) for one in answers),
        )
