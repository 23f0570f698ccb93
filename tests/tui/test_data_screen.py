"""The Data screen: rows, statistics and settings, on real files through real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.widgets import Input

from qlora_tui.recipe.schema import Source
from tests.tui.data_screen import data_app, screen_of
from tests.tui.sample_data import ticket, tickets, write_rows
from tests.tui.screen_assertions import wait_for_text


async def test_a_row_shows_trained_tokens_and_keys_move_between_rows(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    async with data_app(model, "tickets.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot, "row 1 of 40", "<|im_start|>assistant", "Parcel 1 is on its way.<|im_end|>↵"
        )
        await pilot.press("l")
        await wait_for_text(pilot, "row 2 of 40", "Parcel 2")
        await pilot.press("h", "h")
        await wait_for_text(pilot, "row 1 of 40")
        await pilot.press("colon")
        await pilot.press(*"17", "enter")
        await wait_for_text(pilot, "row 17 of 40", "Where is parcel 17?")


@pytest.mark.parametrize(("weight", "steps"), [(1.0, 5), (3.0, 15)])
async def test_steps_count_the_weight_of_the_source(
    model: str, here: Path, weight: float, steps: int
) -> None:
    write_rows(here / "pairs.jsonl", [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(40)])
    app = data_app(model, "pairs.jsonl", packing=False, validation_fraction=0.0)
    app.workbench.set("data.sources", (Source(path=str(here / "pairs.jsonl"), weight=weight),))
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, f"about {steps} an epoch")


async def test_keys_change_length_split_weight_and_loss_mask(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "✂ 64")
        await pilot.press("plus", "t", "e", "b")
        data = app.workbench.recipe.data
        assert (data.max_length, data.overflow, data.train_on, data.packing) == (
            128,
            "split",
            "everything",
            False,
        )
        await pilot.press("s")
        pilot.app.screen.query_one(Input).value = "1.5"
        await pilot.press("enter")
        await wait_for_text(pilot, "Enter a share below 1, or the path")
        pilot.app.screen.query_one(Input).value = "tickets.jsonl"
        await pilot.press("enter")
        assert app.workbench.recipe.data.validation_path == str(here / "tickets.jsonl")
        await pilot.press("w")
        pilot.app.screen.query_one(Input).value = "2.5"
        await pilot.press("enter")
        assert app.workbench.recipe.data.sources[0].weight == 2.5
        await pilot.press("minus", "minus", "minus", "minus", "minus")
        assert app.workbench.recipe.data.max_length == 16


async def test_a_row_is_shown_while_a_large_file_is_read(model: str, here: Path) -> None:
    write_rows(here / "large.jsonl", [ticket(n) for n in range(1, 12_001)])
    app = data_app(model, "large.jsonl")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Where is parcel 1?")
        screen = screen_of(app)
        assert screen.report is None or not screen.report.complete
        screen.action_row(8_999)
        await wait_for_text(pilot, "Where is parcel 9000?")
        assert screen.report is None or not screen.report.complete
        await pilot.press("h")
        await wait_for_text(pilot, "Where is parcel 8999?")
