"""The rows of a source by what a run learned: the list, shaded tokens, and training without some."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qlora_tui.data.dataset_report import Piece, Shown
from qlora_tui.files import private_dir
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.runs import actions
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.row_losses import MeasuredRow, classify, write_row_losses
from qlora_tui.tui.screens.data.sample import TokenStyles, legend, sample
from tests.tui.data_screen import data_app, whole
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.sample_data import tickets
from tests.tui.screen_assertions import wait_for_text, wait_until


def measured_run(file: Path, name: str = "") -> RunDir:
    """A finished run on a file, whose rows 7 and 9 are suspicious."""
    recipe = Recipe(data=Data(sources=(Source(path=str(file)),)))
    run = write_fake_run(FakeRun(name="tickets-1", state="finished", steps=60, total=60, recipe=recipe))
    (private_dir(run.adapter_dir) / "adapter_config.json").write_text("{}")
    rows = [
        MeasuredRow(
            source=0,
            row=number,
            file=name,
            before=(3.0,) * 9,
            after=(0.05 if number == 12 else 1.0,) * 9,
            other_prompt={7: 0.9, 9: 1.1}.get(number, 3.0 + number / 100),
            contradicts=20 if number == 5 else None,
        )
        for number in range(1, 39)
    ]
    write_row_losses(run, *classify(run.id, rows, 4.0))
    return run


async def test_marked_rows_are_left_out_and_the_run_queued(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    measured_run(tickets(here / "tickets.jsonl"))
    app = data_app(model, "tickets.jsonl", max_length=128)
    async with app.run_test(size=(120, 40)) as pilot:
        await whole(pilot)
        await pilot.press("B")
        await wait_for_text(pilot, "never learned")
        await pilot.press("space", "space", "x")
        await wait_for_text(pilot, "1 waiting", "undo")
        queued = next(run for run in all_runs() if run.id != "tickets-1")
        assert queued.recipe().data.sources[0].excluded_rows == "7, 9"
        await wait_until(pilot, lambda: app.workbench.recipe.data.sources[0].excluded_rows == "7, 9")
        await pilot.press("u")
        assert app.workbench.recipe.data.sources[0].excluded_rows == ""


async def test_rows_of_a_folder_are_left_out_of_their_file(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    folder = here / "tickets"
    folder.mkdir()
    tickets(folder / "a.jsonl")
    tickets(folder / "b.jsonl")
    measured_run(folder, "b.jsonl")
    app = data_app(model, "tickets", max_length=128)
    async with app.run_test(size=(120, 40)) as pilot:
        await whole(pilot)
        await pilot.press("B")
        await wait_for_text(pilot, "b.jsonl:7")
        await pilot.press("enter")
        await wait_for_text(pilot, "b.jsonl row 7")
        await pilot.press("B")
        await wait_for_text(pilot, "b.jsonl:7")
        await pilot.press("x")
        await wait_for_text(pilot, "1 waiting", "undo")
        await wait_until(pilot, lambda: app.workbench.recipe.data.sources[0].excluded_rows == "b.jsonl: 7")


async def test_leaving_the_app_ends_the_measurement(
    model: str, here: Path, endless_measurements: list[subprocess.Popen[bytes]]
) -> None:
    """Otherwise the app waits for it, without a terminal."""
    run = measured_run(tickets(here / "tickets.jsonl"))
    for measured in (run.path / "row_losses.json", run.path / "row_losses.f32"):
        measured.unlink()
    app = data_app(model, "tickets.jsonl", max_length=128)
    async with app.run_test(size=(80, 24)) as pilot:
        await whole(pilot)
        await pilot.press("B")
        await wait_until(pilot, lambda: len(endless_measurements) == 1)
    assert endless_measurements[0].wait(60)


def test_tokens_carry_marks_that_need_no_color() -> None:
    shown = Shown(
        row=1,
        samples=((Piece("Where?", False, False), Piece("It left Oslo", True, False)),),
        token_counts=(4,),
        trained_counts=(3,),
        trained_texts=(("It", " left", " Oslo"),),
    )
    changes, changes_of_others = ((3.0, 0.5), (1.0, 0.9), (0.5, 1.5)), ((3.0, 0.5),)
    styles = TokenStyles("bold")
    assert sample(shown, (), Data(), styles, changes).plain == "Where?▾It left ▴Oslo"
    assert "▾fell by" in legend(shown, changes, styles).plain
    assert sample(shown, (), Data(), styles, changes_of_others).plain == "Where?It left Oslo"
    assert "to learn" in legend(shown, changes_of_others, styles).plain
