from __future__ import annotations

import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from qlora_tui import paths
from qlora_tui.recipe.presets import find_preset
from qlora_tui.recipe.schema import Source
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.draft import Draft, open_workbench
from qlora_tui.tui.screens.presets.screen import PresetsScreen
from qlora_tui.tui.widgets.controls import ViList
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import config_folder, open_on


def mine(name: str) -> Path:
    return paths.user_presets_dir() / f"{name}.toml"


async def go_to(pilot: Pilot[Any], name: str) -> None:
    """Open the presets and put the cursor on one."""
    if not isinstance(pilot.app.screen, PresetsScreen):
        await pilot.press("p")
    await wait_for_text(pilot, "Enter open")
    list_ = pilot.app.screen.query_one(ViList)
    await pilot.press("g")
    while list_.current != name:
        await pilot.press("j")


async def test_a_preset_says_what_it_changes_keeps_model_and_data_and_is_undone(private_home: Path) -> None:
    rows = private_home / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 400)
    app = open_on("memory", model=str(config_folder(private_home, "HuggingFaceTB__SmolLM2-135M")))
    app.workbench.set("data.sources", (Source(path=str(rows)),))
    before = app.workbench.recipe
    async with app.run_test(size=(120, 40)) as pilot:
        await go_to(pilot, "paper")
        await wait_for_text(pilot, "Opening this preset changes", "lora.rank", "16 → 64", "memory")
        await wait_for_text(pilot, "time now", "time then", "known after the first steps", "about 2 steps")
        await pilot.press("enter")
        await wait_for_text(pilot, " paper · SmolLM2-135M")
        assert app.workbench.recipe.lora.rank == 64
        assert (app.workbench.recipe.model, app.workbench.recipe.data.sources) == (
            before.model,
            before.data.sources,
        )
        await pilot.press("u")
        assert app.workbench.recipe == before
        await wait_for_text(pilot, "balanced · SmolLM2-135M")


async def test_a_preset_is_saved_replaced_only_after_a_question_and_undone() -> None:
    mine("tickets").write_text('note = "by hand"\n[lora]\nrank = 4\n')
    app = open_on("memory")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("r", "p", "s", *"mine: for tests", "enter")
        await wait_for_text(pilot, "● mine  yours", "for tests", "The recipe already matches this preset.")
        assert find_preset("mine").note == "for tests"
        assert find_preset("mine").recipe().lora.rank == 32
        assert not app.workbench.modified
        await pilot.press("u")
        await wait_for_text(pilot, "balanced")
        assert not mine("mine").exists()
        # It began as the one before, and has left it.
        again = open_workbench(Draft())
        assert again.preset == app.workbench.preset == "balanced" and again.modified

        await pilot.press("s", *"tickets", "enter")
        await wait_for_text(pilot, "Preset exists", "y replace it")
        await pilot.press("n")
        assert "by hand" in mine("tickets").read_text()
        await pilot.press("enter")
        await wait_for_text(pilot, "Preset exists")
        await pilot.press("y")
        await wait_for_text(pilot, "● tickets")
        assert "by hand" not in mine("tickets").read_text()

        # An edit made since is not lost by an undo.
        mine("tickets").write_text('note = "edited since"\n')
        await pilot.press("u")
        await wait_for_text(pilot, "Preset exists", "n keep it")
        await pilot.press("n")
        assert "edited since" in mine("tickets").read_text()


async def test_a_deletion_is_undone_exactly_and_shipped_presets_stay() -> None:
    mine("tickets").write_text('# why\nnote = "by hand"\n')
    app = open_on("memory")
    async with app.run_test(size=(80, 24)) as pilot:
        await go_to(pilot, "tickets")
        await pilot.press("D")
        assert not mine("tickets").exists()
        await pilot.press("u")
        assert mine("tickets").read_text() == '# why\nnote = "by hand"\n'
        await go_to(pilot, "style")
        await pilot.press("D")
        await wait_for_text(pilot, "is a bundled preset")


async def test_presets_are_imported_with_their_comments_explained_and_exported(tmp_path: Path) -> None:
    (tmp_path / "theirs.toml").write_text("# from a friend\n[lora]\nrank = 4\n")
    (tmp_path / "wrong.toml").write_text("[lora]\nrank = 0\n")
    mine("broken").write_text("[lora]\nrnak = 8\n")
    app = open_on("memory")
    async with app.run_test(size=(120, 40)) as pilot:
        await go_to(pilot, "broken")
        await wait_for_text(pilot, "✗ broken", "rnak", "rank")
        await pilot.press("enter")
        await wait_for_text(pilot, "Esc close")
        await pilot.press("escape")
        assert isinstance(app.screen, PresetsScreen)
        await import_(pilot, tmp_path / "theirs.toml")
        await wait_for_text(pilot, "theirs  yours", "16 → 4")
        assert "from a friend" in mine("theirs").read_text()
        await pilot.press("u")
        assert not mine("theirs").exists()
        await import_(pilot, tmp_path / "wrong.toml")
        await wait_for_text(pilot, "lora.rank")
        await pilot.press("escape")
        await go_to(pilot, "paper")
        await pilot.press("e")
        app.screen.query_one(Input).value = str(tmp_path)
        await pilot.press("enter")
        await pilot.pause()
        assert (tmp_path / "paper.toml").read_bytes() == find_preset("paper").path.read_bytes()
        await pilot.press("e")
        app.screen.query_one(Input).value = str(tmp_path)
        await pilot.press("enter")
        await wait_for_text(pilot, "File already exists")


async def import_(pilot: Pilot[Any], path: Path) -> None:
    await go_to(pilot, "balanced")
    await pilot.press("i")
    pilot.app.screen.query_one(Input).value = str(path)
    await pilot.press("enter")


async def test_the_editors_result_for_a_users_preset_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "[lora]\\nrank = -1\\n" > "$1"\n')
    editor.chmod(editor.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("VISUAL", str(editor))
    # A test has no terminal to hand over; the editor is a real process all the same.
    monkeypatch.setattr(QloraApp, "suspend", lambda self: nullcontext())
    mine("tickets").write_text("[lora]\nrank = 4\n")
    async with open_on("memory").run_test(size=(120, 40)) as pilot:
        await go_to(pilot, "style")
        await pilot.press("o")
        await wait_for_text(pilot, "Shipped presets cannot be edited")
        await pilot.press("escape")
        await go_to(pilot, "tickets")
        await pilot.press("o")
        await wait_for_text(pilot, "lora.rank", "Esc close")
        assert mine("tickets").read_text() == "[lora]\nrank = -1\n"
