"""The Data screen: opening, replacing and removing files, folders and datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.tui.screens.data.dialogs import FilePickerScreen
from tests.data.fake_dataset_hub import dataset_hub
from tests.tui.data_screen import data_app, screen_of
from tests.tui.sample_data import ticket, tickets, write_rows
from tests.tui.screen_assertions import text_of, wait_for_text
from tests.tui.workstation import open_on


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ("✗ No such data", "odd.jsonl does not exist.", "▸ Check the path", "[o] open")),
        ([], ("✗ Empty file", "odd.jsonl is empty.", "[x] remove this one")),
        (["{oops"] * 3, ("✗ Not valid JSON", "Line 1 is not valid JSON", "▸ Correct the line")),
        ([{"a": "b"}] * 3, ("✗ No usable field", "Its rows contain:", "[c] map the columns")),
    ],
)
async def test_a_files_error_is_shown_in_place_of_the_sample(
    model: str, here: Path, content: list[Any] | None, says: tuple[str, ...]
) -> None:
    if content is not None:
        write_rows(here / "odd.jsonl", content)
    async with data_app(model, "odd.jsonl").run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, *says)
        await pilot.press("x")
        await wait_for_text(pilot, "No data yet.")
        await pilot.press("u")
        await wait_for_text(pilot, *says)


async def test_opening_a_file_replaces_an_unusable_one(model: str, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"foo": 1}] * 3)
    good = tickets(here / "tickets.jsonl")
    other = write_rows(here / "other.jsonl", [ticket(n) for n in range(1, 4)])
    app = data_app(model, "odd.jsonl")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "✗ No usable field", "[o] open")
        screen_of(app).add_source(good)
        await wait_for_text(pilot, "Where is parcel 1?", "Replaced odd.jsonl")
        assert [s.path for s in app.workbench.recipe.data.sources] == [str(good)]
        screen_of(app).add_source(other)
        assert [s.path for s in app.workbench.recipe.data.sources] == [str(good), str(other)]
        await pilot.press("u", "u")
        assert [s.path for s in app.workbench.recipe.data.sources] == ["odd.jsonl"]


async def test_a_second_file_is_announced_and_can_replace_the_first(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    tickets(here / "other.jsonl")
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "Parcel 1", "Source")
        await pilot.press("o")
        await wait_for_text(pilot, "Add data")
        await pilot.press(*"other", "enter")
        await wait_for_text(pilot, "Mix of 2 files", "Tokens of other.jsonl", "the recipe trains on 2 files")
        await pilot.press("O")
        await wait_for_text(pilot, "Train on other data")
        await pilot.press(*"other", "enter")
        await wait_for_text(pilot, "Replaced 2 files by other.jsonl")
        assert [Path(s.path).name for s in app.workbench.recipe.data.sources] == ["other.jsonl"]


async def test_a_file_fixed_on_disk_is_read_again_on_return(model: str, here: Path) -> None:
    file = write_rows(here / "tickets.jsonl", ["{broken", ticket(1)])
    app = data_app(model, "tickets.jsonl")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Not valid JSON")
        write_rows(file, [ticket(1), ticket(2)])
        await pilot.press("3", "2")
        # With more epochs it has steps enough.
        app.edit("training.epochs", 40.0)
        shown = await wait_for_text(pilot, "Parcel 1 is on its way", "✓ No problems found")
        # No row has a problem to go to or to fix.
        assert "Not valid JSON" not in shown and "n next" not in shown and "m fix" not in shown
        write_rows(file, ["{broken", ticket(1)])
        await pilot.press("f5")
        await wait_for_text(pilot, "Not valid JSON")


async def test_the_first_own_data_replaces_the_demos(model: str, here: Path) -> None:
    own = tickets(here / "tickets.jsonl")
    app = data_app(model, str(CONVERSATIONS))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "conversations.jsonl")
        screen_of(app).add_source(own)
        await wait_for_text(pilot, "Replaced the demo's data", "Parcel 1")
        assert [source.path for source in app.workbench.recipe.data.sources] == [str(own)]
        screen_of(app).add_source(own.with_name("more.jsonl"))
        assert len(app.workbench.recipe.data.sources) == 2
        await pilot.press("u", "u")
        assert [source.path for source in app.workbench.recipe.data.sources] == [str(CONVERSATIONS)]


async def test_a_file_is_found_by_partial_name_and_remembered(model: str, here: Path) -> None:
    tickets(here / "tickets.jsonl")
    tickets(here / "other.jsonl")
    (here / "picture.png").touch()
    app = open_on("data", model=model)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("o")
        await wait_for_text(pilot, "other.jsonl", "tickets.jsonl", "../")
        assert isinstance(app.screen, FilePickerScreen)
        assert "picture.png" not in text_of(app)
        await pilot.press(*"kets")
        await pilot.press("enter")
        await wait_for_text(pilot, "Where is parcel 1?")
        await pilot.press("o")
        await wait_for_text(pilot, "recent")
        await pilot.press("down", "down", "enter")
        await pilot.pause()
        assert [Path(s.path).name for s in app.workbench.recipe.data.sources] == [
            "tickets.jsonl",
            "tickets.jsonl",
        ]


async def test_a_path_can_be_typed_completed_or_chosen_as_folder(model: str, here: Path) -> None:
    (here / "set").mkdir()
    tickets(here / "set" / "tickets.jsonl")
    app = open_on("data", model=model)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("o")
        await pilot.press(*"nothing", "enter")
        await wait_for_text(pilot, "No name here contains 'nothing'")
        app.screen.query_one(Input).value = f"{here}/se"
        await pilot.pause()
        await pilot.press("tab")
        await wait_for_text(pilot, "tickets.jsonl")
        await pilot.press("ctrl+o")
        await wait_for_text(pilot, "set", "Where is parcel 1?")
        assert app.workbench.recipe.data.sources[0].path == str(here / "set")


async def test_rows_and_problems_go_through_every_file_of_a_folder(model: str, here: Path) -> None:
    (here / "set").mkdir()
    write_rows(here / "set" / "a.jsonl", [ticket(1), ticket(2)])
    write_rows(here / "set" / "b.jsonl", [ticket(3), ticket(3)])
    write_rows(here / "set" / "c.jsonl", [ticket(4), ticket(5), ticket(5)])
    async with data_app(model, "set").run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot,
            "a.jsonl row 1 of 2",
            "Duplicate row: 1 row, used  b.jsonl",
            "Duplicate row: 1 row, used  c.jsonl",
        )
        await pilot.press("h", "l")
        await wait_for_text(pilot, "a.jsonl row 2 of 2", "Where is parcel 2?")
        await pilot.press("l")
        await wait_for_text(pilot, "b.jsonl row 1 of 2", "Where is parcel 3?")
        await pilot.press("h")
        await wait_for_text(pilot, "a.jsonl row 2 of 2")
        await pilot.press("n")
        await wait_for_text(pilot, "b.jsonl row 2 of 2", "⚠ Duplicate row")
        await pilot.press("n")
        await wait_for_text(pilot, "c.jsonl row 3 of 3", "⚠ Duplicate row")
        await pilot.press("l")
        await wait_for_text(pilot, "c.jsonl row 3 of 3")
        await pilot.press("colon", *"b 1", "enter")
        await wait_for_text(pilot, "b.jsonl row 1 of 2")
        assert "⚠ Duplicate row" not in text_of(pilot.app).split("b.jsonl row 1")[1].split("Duplicate")[0]


@pytest.mark.slow
async def test_a_dataset_of_the_hub_is_opened_by_its_id(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f'{{"prompt": "Where is parcel {n}?", "completion": "Here."}}\n' for n in range(3))
    about = b"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with dataset_hub({"README.md": about, "train.jsonl": rows.encode()}) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        app = open_on("data", model=model)
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.press("o")
            await pilot.press(*"owner/parcels")
            await wait_for_text(pilot, "hub  owner/parcels")
            await pilot.press("enter")
            await wait_for_text(pilot, "owner/parcels  hub", "row 1 of 3", "Where is parcel 0?")
            assert app.workbench.recipe.data.sources[0].path == "owner/parcels"
