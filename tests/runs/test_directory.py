from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, leftovers, run_queue
from qlora_tui.runs.directory import RunDir, all_runs, create_run, find_run


def test_directories_are_private(recipe: Recipe) -> None:
    run = create_run(recipe)
    for folder in (run.path, run.control_dir, paths.runs_dir(), paths.state_dir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_files_of_a_run_are_private(recipe: Recipe) -> None:
    run = create_run(recipe)
    for file in (run.recipe_path, run.events_path):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_two_runs_of_one_minute_have_two_names(recipe: Recipe) -> None:
    first, second = create_run(recipe), create_run(recipe)
    assert first.id != second.id
    assert {run.id for run in all_runs()} == {first.id, second.id}


def test_a_run_is_found_by_its_beginning_and_by_last(recipe: Recipe) -> None:
    run = create_run(recipe)
    assert find_run(run.id) == run
    assert find_run("tick") == run
    assert find_run("last") == run


def test_an_exact_name_wins_over_longer_ones(recipe: Recipe) -> None:
    first, second = create_run(recipe), create_run(recipe)
    assert find_run(first.id) == first
    with pytest.raises(UserError, match="Which run"):
        find_run("tickets")
    assert find_run(second.id) == second


def test_a_checkpoint_counts_only_when_it_is_complete(recipe: Recipe) -> None:
    run = create_run(recipe)
    for name, whole in (("step-10", True), ("step-9", True), ("step-11", False), ("step-x", True)):
        folder = run.checkpoints_dir / name
        folder.mkdir()
        if whole:
            (folder / "complete").touch()
    assert [step for step, _ in run.checkpoints()] == [9, 10]


def test_a_directory_that_cannot_be_written_is_explained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_tui.runs.directory.atomic_write", full)
    with pytest.raises(UserError, match="could not be created") as caught:
        create_run(recipe)
    assert "No space left" in caught.value.what
    assert list(paths.runs_dir().iterdir()) == []


def test_runs_created_at_one_instant_have_their_own_recipes(recipe: Recipe) -> None:
    recipes = [replace(recipe, note=f"number {number}") for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(create_run, recipes))
    assert [run.recipe() for run in runs] == recipes
    assert len({run.id for run in runs}) == 40 == len(list(paths.runs_dir().iterdir()))


def test_a_repaired_recipe_does_not_make_a_run_the_last(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("time.time", lambda: 1e9)
        old = create_run(recipe)
    new = create_run(recipe)
    old.recipe_path.write_text(old.recipe_path.read_text())
    os.utime(old.recipe_path, (4e9, 4e9))
    assert all_runs() == [new, old] and find_run("last") == new


def test_an_empty_recipe_of_a_run_is_damaged(recipe: Recipe) -> None:
    run = create_run(recipe)
    run.recipe_path.write_bytes(b"")
    with pytest.raises(UserError, match="runs check"):
        run.recipe()


@pytest.mark.parametrize("at", range(1, 12))
def test_a_run_whose_deletion_is_interrupted_is_gone_or_whole(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = create_run(recipe)
    run_queue.mark_not_queued(run, "Not wanted.")
    files = sorted(run.path.rglob("*"))
    removed = 0

    def interrupted(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **words: object) -> object:
            nonlocal removed
            removed += 1
            if removed >= at:
                raise KeyboardInterrupt
            return call(*args, **words)

        return counted

    with monkeypatch.context() as killed:
        for name in ("unlink", "rmdir", "rename"):
            killed.setattr(os, name, interrupted(getattr(os, name)))
        with suppress(KeyboardInterrupt):
            actions.delete(run)
    if run.path.exists():
        assert sorted(run.path.rglob("*")) == files
    else:
        assert all_runs() == []
        for path in paths.runs_dir().iterdir():
            os.utime(path, (1, 1))
        leftovers.sweep()
        assert list(paths.runs_dir().iterdir()) == []


def test_an_unreadable_choice_of_a_gpu_is_not_forgotten(run: RunDir) -> None:
    assert run.gpu == ""
    run.gpu_path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        _ = run.gpu
