"""Keys of Runs that act on a run: queue, delete, rename, copy, prepare another."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.locks import hold_folder
from qlora_tui.recipe.presets import find_preset
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir, all_runs, find_run
from qlora_tui.runs.status import State, read_status
from qlora_tui.tui import desktop
from qlora_tui.tui.app import QloraApp
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import open_runs


async def test_waiting_runs_stand_on_top_and_are_moved_and_withdrawn(
    three_runs: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    for name in ("first", "second"):
        run_queue.enqueue(write_fake_run(FakeRun(name=name, state="queued", steps=0, began=BEGAN - 5000)))
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await open_runs(app)
        shown = await wait_for_text(pilot, "queue 1", "queue 2", "w Withdraw")
        assert shown.index("first") < shown.index("second") < shown.index("tickets-a")
        await pilot.press("J")
        assert run_queue.waiting() == ["second", "first"]
        await pilot.pause()
        await pilot.press("w")
        await wait_for_text(pilot, "■ stopped", "Removed from the queue. Press [r] to queue it again.")
        assert run_queue.waiting() == ["second"]
        await pilot.press("r")
        await wait_for_text(pilot, "queue 2", "Queued. Press [w] to remove it from the queue.")
        assert run_queue.waiting() == ["second", "first"]


async def test_quitting_never_asks_and_keeps_deleted_runs(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("D", "q")
        await wait_until(pilot, lambda: not app.is_running)
    assert [each.run.id for each in actions.trashed_runs()] == ["tickets-a"]


def _are_left(number: int) -> bool:
    return len(all_runs()) == number


async def test_deleting_a_run_in_use_asks_first(three_runs: list[RunDir]) -> None:
    handle = hold_folder(three_runs[0].path)
    assert handle is not None
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        for key, left in (("n", 3), ("y", 2)):
            await pilot.press("D")
            await wait_for_text(pilot, "Delete the run?", "tickets-a is in use", "loaded for a chat")
            await pilot.press(key)
            await wait_until(pilot, partial(_are_left, left))
    os.close(handle)


async def test_u_restores_a_run_deleted_in_this_app(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    actions.rename(three_runs[0], "tickets [/a]")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets [/a]")
        await pilot.press("D")
        await wait_for_text(pilot, "tickets [/a] is in the trash for 7 days, which holds", "KiB. Press [u]")
        assert [run.id for run in all_runs()] == ["tickets-b", "poems-c"]
        await pilot.press("D", "u", "u")
        assert "is deleted" not in await wait_for_text(pilot, "Restored tickets [/a]", "✓ finished")
        await pilot.press("escape")
        await wait_until(pilot, lambda: "Restored" not in text_of(app))
        assert len(all_runs()) == 3
        assert three_runs[0].recipe().lora.rank == 16
        await pilot.press("g", "D")
        await pilot.pause()
    assert [run.id for run in all_runs()] == ["tickets-b", "poems-c"]
    assert [each.run.id for each in actions.trashed_runs()] == ["tickets-a"]


async def test_a_deleted_run_leaves_the_list_before_the_next_reading(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        earlier = screen.listing
        screen.action_delete()
        screen.listing = earlier
        screen.show_listing()
        screen.action_delete()
        assert [run.id for run in all_runs()] == ["poems-c"]
        assert app.screen is screen


async def test_with_nothing_deleted_u_undoes_a_recipe_change() -> None:
    app = QloraApp()
    app.workbench.set("lora.rank", 32)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await pilot.press("u")
        assert app.workbench.recipe.lora.rank == 16


@pytest.mark.parametrize("state", ["running", "queued"])
async def test_a_run_that_is_not_over_is_not_deleted(state: State) -> None:
    run = write_fake_run(FakeRun(steps=20, state=state))
    if state == "queued":
        run_queue.enqueue(run)
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, run.id[:20])
        await pilot.press("D")
        await wait_for_text(pilot, "The run has not ended")
        assert read_status(run).state == state


async def test_a_renamed_run_is_listed_and_found_under_its_name(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("f2", *(["backspace"] * 20), "enter")
        await wait_for_text(pilot, "Rename the run", "✗ A name is one non-empty line")
        await pilot.press(*"owls", "enter")
        await wait_for_text(pilot, "owls  (tickets-a)")
    assert three_runs[0].path.exists()
    assert find_run("owls") == three_runs[0]


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_runs_folder_opens_or_its_path_is_copied(
    three_runs: list[RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_remote: bool,
) -> None:
    tool, opened = tmp_path / "xdg-open", tmp_path / "opened"
    tool.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.part && mv {opened}.part {opened}\n')
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    for variable in ("TMUX", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(variable, raising=False)
    if is_remote:
        monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 22")
    app = QloraApp()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("O")
        if is_remote:
            await wait_for_text(pilot, "Sent to the terminal (OSC 52)", "cd ")
            assert app.clipboard == f"cd {three_runs[0].path}"
        else:
            await wait_until(pilot, opened.exists)
            assert opened.read_text() == str(three_runs[0].path)


def test_inside_tmux_the_request_is_sent_raw_and_wrapped() -> None:
    raw = "\x1b]52;c;b3dscw==\a"
    assert desktop.set_clipboard("owls", {}) == raw
    assert desktop.set_clipboard("owls", {"TMUX": "x"}) == f"{raw}\x1bPtmux;\x1b{raw}\x1b\\"


async def test_rerun_opens_the_runs_recipe_and_u_undoes_it(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    before = app.workbench.recipe
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("j", "R")
        await wait_for_text(pilot, "Micro-batch")
        assert app.workbench.recipe.lora.rank == 64
        await pilot.press("u")
        assert app.workbench.recipe == before


async def test_a_finished_run_is_trained_further(three_runs: list[RunDir]) -> None:
    run = find_run("tickets-b")
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("j", "T")
        await wait_for_text(pilot, "No adapter to start from")
        run.adapter_dir.mkdir(exist_ok=True)
        (run.adapter_dir / "adapter_config.json").write_text("{}")
        await pilot.press("escape", "T")
        await wait_for_text(pilot, "Micro-batch")
        lora = app.workbench.recipe.lora
        assert (lora.init_from, lora.rank) == (run.id, 64)


async def test_a_runs_settings_are_saved_as_a_preset(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("j", "S", *"wide", "enter")
        await pilot.pause()
        assert find_preset("wide").settings()["lora"]["rank"] == 64
        assert (paths.user_presets_dir() / "wide.toml").exists()
        await pilot.press("j", "S", *"wide", "enter")
        await wait_for_text(pilot, "You already have a preset wide")
        await pilot.press("n")
        assert find_preset("wide").settings()["lora"]["rank"] == 64
