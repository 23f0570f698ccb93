"""Several apps share one draft: none overwrites another's change without asking."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.draft import Draft, draft_path
from qlora_tui.tui.screens.modals.draft_changed import DraftChangedScreen
from tests.power import FaultyDisk
from tests.tui.seeing import shows, until

MakeApp = Callable[[], QloraApp]


def rank_on_disk() -> int:
    return Draft().load().recipe.lora.rank


def edit_elsewhere(rank: int) -> None:
    """What a second app on the account does."""
    draft = Draft()
    bench = draft.load()
    bench.set("lora.rank", rank)
    assert draft.save(bench)


def test_the_second_to_write_sees_that_the_draft_changed() -> None:
    first, second = Draft(), Draft()
    one, two = first.load(), second.load()
    one.set("lora.rank", 8)
    assert first.save(one)
    two.set("lora.rank", 64)
    assert not second.save(two)
    assert rank_on_disk() == 8
    assert second.save(two, replace=True)
    assert not first.save(one), "now the first has to be asked"
    assert rank_on_disk() == 64


def test_the_same_edit_in_two_apps_is_no_conflict() -> None:
    first, second = Draft(), Draft()
    one, two = first.load(), second.load()
    for draft, bench in ((first, one), (second, two)):
        bench.set("lora.rank", 8)
        assert draft.save(bench)


def test_one_app_alone_is_never_asked() -> None:
    draft = Draft()
    bench = draft.load()
    for rank in (8, 32, 64):
        bench.set("lora.rank", rank)
        assert draft.save(bench)
    draft_path().unlink()
    assert draft.save(bench)


def test_the_draft_is_on_the_disk_before_save_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft()
    bench = draft.load()
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    draft.save(bench)
    assert len(synced) >= 2, "the file, and the folder with its name"


@pytest.mark.parametrize(("key", "mine", "on_disk"), [("m", 32, 32), ("t", 8, 8), ("escape", 32, 8)])
async def test_the_app_asks_whose_recipe_stays(make_app: MakeApp, key: str, mine: int, on_disk: int) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Nothing waits")
        assert app.workbench.recipe.lora.rank == 16
        edit_elsewhere(8)
        app.edit("lora.rank", 32)
        shown = await shows(pilot, "Another app changed the recipe", "Keep mine", "Take theirs")
        assert "32" in shown and "8" in shown
        app.edit("lora.alpha", 64)
        await pilot.pause()
        assert sum(isinstance(screen, DraftChangedScreen) for screen in app.screen_stack) == 1
        await pilot.press(key)
        await until(pilot, lambda: not isinstance(app.screen, DraftChangedScreen))
        assert app.workbench.recipe.lora.rank == mine
        assert rank_on_disk() == on_disk
        if key == "t":
            app.action_undo()
            assert app.workbench.recipe.lora.rank == 32


async def test_an_edit_that_cannot_be_saved_stands_and_is_said(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Nothing waits")
        with monkeypatch.context() as full:
            FaultyDisk(full, 1, errno.ENOSPC, lasting=True)
            app.edit("lora.rank", 32)
        await until(pilot, lambda: bool(app._notifications))
        assert app.workbench.recipe.lora.rank == 32
        app.edit("lora.alpha", 64)
        assert rank_on_disk() == 32
