"""Several apps share one draft: none overwrites another's change without asking."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from qlora_tui.recipe.toml import parse, to_recipe
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.draft import Draft, draft_path, open_workbench
from qlora_tui.tui.screens.modals.dialogs import DraftChangedScreen
from tests.support.power import FaultyDisk
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until


def rank_on_disk() -> int:
    return open_workbench(Draft()).recipe.lora.rank


def edit_elsewhere(rank: int) -> None:
    """What a second app on the account does."""
    draft = Draft()
    workbench = open_workbench(draft)
    workbench.set("lora.rank", rank)
    assert draft.save(workbench)


def test_the_second_to_write_sees_that_the_draft_changed() -> None:
    first, second = Draft(), Draft()
    one, two = open_workbench(first), open_workbench(second)
    one.set("lora.rank", 8)
    assert first.save(one)
    two.set("lora.rank", 64)
    assert not second.save(two)
    assert rank_on_disk() == 8
    assert to_recipe(parse(second.aside.read_text(), ""), "").lora.rank == 64
    assert second.save(two, replace=True)
    assert to_recipe(parse(second.aside.read_text(), ""), "").lora.rank == 8, "nothing is lost"
    assert not first.save(one), "now the first has to be asked"
    assert rank_on_disk() == 64
    assert first.save(one, replace=True)
    kept_aside = {second.aside, first.aside}
    two.set("lora.rank", 32)
    assert not second.save(two)
    ranks = [to_recipe(parse(path.read_text(), ""), "").lora.rank for path in (*kept_aside, second.aside)]
    assert sorted(ranks) == [8, 32, 64], "each conflict has a file"


def test_the_same_edit_in_two_apps_is_no_conflict() -> None:
    first, second = Draft(), Draft()
    one, two = open_workbench(first), open_workbench(second)
    for draft, workbench in ((first, one), (second, two)):
        workbench.set("lora.rank", 8)
        assert draft.save(workbench)


def test_one_app_alone_is_never_asked() -> None:
    draft = Draft()
    workbench = open_workbench(draft)
    for rank in (8, 32, 64):
        workbench.set("lora.rank", rank)
        assert draft.save(workbench)
    draft_path().unlink()
    assert draft.save(workbench)


def test_the_draft_is_on_the_disk_before_save_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft()
    workbench = open_workbench(draft)
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    draft.save(workbench)
    assert len(synced) >= 2, "the file, and the folder with its name"


def newer_version(text: str) -> bytes:
    return text.replace("[lora]", "[lora]\nsetting_of_a_newer_version = 3").encode()


def one_bad_byte(text: str) -> bytes:
    return text.encode()[:-3] + b"\xff" + text.encode()[-3:]


UNREADABLE = pytest.mark.parametrize("damage", [newer_version, one_bad_byte])


def damage_draft(damage: Callable[[str], bytes]) -> bytes:
    edit_elsewhere(7)
    content = damage(draft_path().read_text())
    draft_path().write_bytes(content)
    return content


def moved_aside() -> list[bytes]:
    return [path.read_bytes() for path in draft_path().parent.glob("draft.toml.damaged-*")]


@UNREADABLE
def test_a_draft_that_cannot_be_read_is_moved_aside(damage: Callable[[str], bytes]) -> None:
    content = damage_draft(damage)
    draft = Draft()
    workbench = open_workbench(draft)
    assert moved_aside() == [content]
    assert workbench.draft_error is not None and "draft.toml.damaged-" in workbench.draft_error.fix
    workbench.set("lora.rank", 9)
    assert draft.save(workbench) and rank_on_disk() == 9
    assert moved_aside() == [content]


@UNREADABLE
def test_a_draft_that_cannot_be_moved_aside_is_not_overwritten(
    damage: Callable[[str], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = damage_draft(damage)
    draft = Draft()
    with monkeypatch.context() as full:
        FaultyDisk(full, 1, errno.EROFS, lasting=True)
        workbench = open_workbench(draft)
    assert workbench.draft_error is not None
    assert not draft.save(workbench) and draft_path().read_bytes() == content


def is_about_the_draft(message: str) -> bool:
    return "The recipe being edited could not be read" in message and "draft.toml.damaged-" in message


async def test_the_app_says_that_the_draft_could_not_be_read() -> None:
    content = damage_draft(one_bad_byte)
    app = QloraApp()
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: any(is_about_the_draft(said.message) for said in app._notifications))
        content_of_another = damage_draft(one_bad_byte)
        app.edit("lora.rank", 32)
        await pilot.pause()
        assert rank_on_disk() == 32 and sorted(moved_aside()) == sorted([content, content_of_another])


async def test_the_app_asks_whose_recipe_stays() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Next step")
        assert app.workbench.recipe.lora.rank == 16
        for key, rank, on_disk in (("t", 8, 8), ("m", 64, 64), ("escape", 32, 8)):
            mine = 32 if key == "t" else rank
            edit_elsewhere(8)
            app.edit("lora.rank", mine)
            shown = await wait_for_text(
                pilot, "Another window of the app changed the recipe", "m keep mine", "t use theirs"
            )
            assert str(mine) in shown and "8" in shown
            app.edit("lora.alpha", app.workbench.recipe.lora.alpha * 2)
            await pilot.pause()
            assert sum(isinstance(screen, DraftChangedScreen) for screen in app.screen_stack) == 1
            await pilot.press(key)
            await wait_until(pilot, lambda: not isinstance(app.screen, DraftChangedScreen))
            assert (app.workbench.recipe.lora.rank, rank_on_disk()) == (rank, on_disk), key
            if key == "t":
                app.action_undo()
                assert app.workbench.recipe.lora.rank == 32


async def test_a_change_in_another_window_is_marked_and_loaded_by_a_key() -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "balanced")
        edit_elsewhere(8)
        await wait_for_text(pilot, "From a model", "changed in another window, F7 reload")
        await pilot.press("4")
        await wait_for_text(pilot, "changed in another window, F7 reload")
        assert app.workbench.recipe.lora.rank == 16
        await pilot.press("f7")
        await wait_until(pilot, lambda: "changed in another window" not in text_of(app))
        assert app.workbench.recipe.lora.rank == 8
        await pilot.press("u")
        assert app.workbench.recipe.lora.rank == rank_on_disk() == 16


async def test_an_edit_that_cannot_be_saved_stands_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Next step")
        with monkeypatch.context() as full:
            FaultyDisk(full, 1, errno.ENOSPC, lasting=True)
            app.edit("lora.rank", 32)
        await wait_until(pilot, lambda: bool(app._notifications))
        assert app.workbench.recipe.lora.rank == 32
        app.edit("lora.alpha", 64)
        assert rank_on_disk() == 32
