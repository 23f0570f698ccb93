"""The Data screen: rows, statistics and settings, on real files through real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from qlora_tui.data.dataset_report import Piece, Shown
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Finished
from qlora_tui.tui.screens.data.sample import row_title
from tests.tui.data_screen import data_app, screen_of
from tests.tui.fake_runs import FakeRun, write_fake_run
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


async def test_the_statistics_alone_still_show_why_nothing_can_be_read(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "row 1 of 40")
        await pilot.press("v")
        await wait_for_text(pilot, "max length")
        app.workbench.set("data.sources", (Source(path="missing.jsonl"),))
        app.recipe_edited()
        await wait_for_text(pilot, "✗ No such data")


async def test_rows_left_out_are_counted_apart_from_those_cut(model: str, here: Path) -> None:
    long, short = "why? " * 100, "so."
    pairs = [(short, short), (long, short), (short, long)]
    write_rows(here / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])
    async with data_app(model, "pairs.jsonl", max_length=64).run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "2 from 3 rows, 1 left out")
        await wait_for_text(
            pilot, "over 64: 1 cut right · 1", "answers only", "only read   control    control to learn"
        )
        await pilot.press("l")
        # No token of it is shown, whose style would need the legend.
        assert "control to learn" not in await wait_for_text(pilot, "Nothing is left to learn within 64")


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


def trained_before(recipe: Recipe) -> None:
    """A run of it has finished, at 10 tokens a second."""
    run = write_fake_run(FakeRun(state="queued", recipe=recipe))
    with EventWriter(run.events_path) as log:
        log.append(Finished(at=1.0, step=9, seconds=9.0, tokens_per_s=10.0))


async def test_costs_of_other_lengths_include_the_last_runs_time(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    app = data_app(model, "tickets.jsonl", max_length=64)
    trained_before(app.workbench.recipe)
    async with app.run_test(size=(200, 60)) as pilot:
        text = await wait_for_text(pilot, "max length", "▸ now", "90%", "memory        time", "fits")
        assert "in all, about" in text
        (line,) = [line for line in text.splitlines() if "▸ now" in line]
        assert "64" in line
        assert "MiB" in line


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


@pytest.mark.parametrize(("too_long", "in_loss"), [("cut-right", "256 of 256"), ("split", "1,000 of 1,000")])
def test_a_split_row_counts_all_its_tokens_in_the_loss(too_long: Any, in_loss: str) -> None:
    trained = (256, 256, 256, 232) if too_long == "split" else (256,)
    shown = Shown(1, tuple((Piece("x", True, False),) for _ in trained), (1000,), trained)
    words = row_title(("", 1), None, shown, Data(max_length=256, overflow=too_long), 80).plain
    assert f"{in_loss} tokens to learn" in words
