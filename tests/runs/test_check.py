"""Each way in which a run can be damaged: it is named with its remedy, and repaired."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.checksums import NAME, digest, write_checksums
from qlora_tui.locks import locked
from qlora_tui.publishing import draft_path, earlier_path
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, leftovers, run_queue
from qlora_tui.runs.check import apply_repairs, check_leftovers, check_queue, check_run
from qlora_tui.runs.damage import (
    ADAPTER_FILES,
    adapter_damage,
    checkpoint_damage,
    checksum_damage,
)
from qlora_tui.runs.directory import RunDir, queue_path
from qlora_tui.runs.event_log import EventTail, EventWriter, last_event
from qlora_tui.runs.events import AnyEvent, Failed, Finished
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, read_status, write_status
from tests.runs import story
from tests.runs.damage import put_adapter, put_checkpoint
from tests.runs.test_leftovers import killed
from tests.support.power import FaultyDisk


def flip(file: Path, place: int) -> None:
    """Change one byte, as a bad disk or cable does."""
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "adapter_config.json", NAME])
def test_a_flipped_byte_in_a_checkpoint_is_damage(tmp_path: Path, name: str) -> None:
    folder = put_checkpoint(tmp_path / "step-1")
    assert checkpoint_damage(folder) is None
    flip(folder / name, -9)
    damage = checkpoint_damage(folder)
    assert damage is not None and name in damage


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\xff" * 200])
def test_an_adapter_emptied_by_a_power_cut_is_damage(tmp_path: Path, content: bytes) -> None:
    folder = put_adapter(tmp_path / "adapter")
    assert adapter_damage(folder) is None
    (folder / "adapter_model.safetensors").write_bytes(content)
    assert adapter_damage(folder) is not None


def test_only_the_named_files_of_an_adapter_are_read(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "step-1")
    flip(folder / "optimizer.pt", 1000)
    assert checksum_damage(folder) is not None
    assert checksum_damage(folder, only=["adapter_model.safetensors", "adapter_config.json"]) is None


@pytest.mark.parametrize(
    "line",
    ["", "short  x\n", *(f"{'0' * 64}  {name}\n" for name in ("../recipe.toml", "/etc/passwd", "a\0b"))],
)
def test_a_damaged_list_of_checksums_reads_nothing_outside(tmp_path: Path, line: str) -> None:
    folder = put_adapter(tmp_path / "adapter")
    (folder / NAME).write_text(line)
    assert NAME in (adapter_damage(folder) or "")


def test_a_pipe_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    write_checksums(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "tokenizer.json" in (adapter_damage(folder) or "")


def without_weights(sums: Path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "adapter_model" not in line))


def first_line_only(sums: Path) -> None:
    sums.write_text(sums.read_text().splitlines(keepends=True)[0])


@pytest.mark.parametrize("edit", [without_weights, first_line_only])
@pytest.mark.parametrize("put", [put_adapter, put_checkpoint])
def test_weights_that_the_checksums_do_not_list_are_damage(
    tmp_path: Path, put: Callable[[Path], Path], edit: Callable[[Path], None]
) -> None:
    folder = put(tmp_path / "adapter")
    write_checksums(folder)
    flip(folder / "adapter_model.safetensors", -1)
    edit(folder / NAME)
    assert NAME in (adapter_damage(folder) or "")
    assert NAME in (checksum_damage(folder, only=ADAPTER_FILES) or "")
    if put is put_checkpoint:
        assert checkpoint_damage(folder) is not None


def test_a_checkpoint_without_its_checksums_is_damage(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "step-1")
    (folder / NAME).unlink()
    assert NAME in (checksum_damage(folder, only=ADAPTER_FILES) or "")
    assert NAME in (checkpoint_damage(folder) or "")


def unlisted_tokenizer(sums: Path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "tokenizer" not in line))


@pytest.mark.parametrize("edit", [unlisted_tokenizer, without_weights, Path.unlink])
def test_checksums_of_a_finished_run_that_were_edited_are_damage(
    tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    folder = put_adapter(tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    write_checksums(folder)
    with EventWriter(tmp_path / "events.jsonl") as log:
        log.append(Finished(at=1.0, step=2, seconds=1.0, tokens_per_s=1.0, checksums=digest(folder)))
    assert adapter_damage(folder) is None
    edit(folder / NAME)
    assert NAME in (adapter_damage(folder) or "")
    assert NAME in (checksum_damage(folder, only=ADAPTER_FILES) or "")


def test_an_adapter_from_before_checksums_were_recorded_is_whole(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "adapter")
    with EventWriter(tmp_path / "events.jsonl") as log:
        log.append(Finished(at=1.0, step=2, seconds=1.0, tokens_per_s=1.0))
    assert adapter_damage(folder) is None


@pytest.fixture(autouse=True)
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr("qlora_tui.training.reporter.HEARTBEAT_S", 1e6)


@pytest.fixture
def finished(recipe: Recipe) -> RunDir:
    """An intact run, with an adapter and two checkpoints that hold its recipe."""
    run = story.submitted(recipe)
    reporter = story.begin(run)
    story.train(run, reporter, 1, 2)
    story.finish(run, reporter, 2)
    return run


def damaged_weights(run: RunDir) -> None:
    flip(run.adapter_dir / "adapter_model.safetensors", -1)


def no_adapter(run: RunDir) -> None:
    shutil.rmtree(run.adapter_dir)


def adapter_moved_aside(run: RunDir) -> None:
    draft_path(run.adapter_dir).mkdir()
    run.adapter_dir.rename(earlier_path(run.adapter_dir))


def checkpoint_moved_aside(run: RunDir) -> None:
    draft_path(run.checkpoints_dir / "step-2").mkdir()
    (run.checkpoints_dir / "step-2").rename(earlier_path(run.checkpoints_dir / "step-2"))


def damaged_checkpoint(run: RunDir) -> None:
    flip(run.checkpoints_dir / "step-2/optimizer.pt", 9)


def no_status(run: RunDir) -> None:
    run.status_path.unlink()


def empty_status(run: RunDir) -> None:
    run.status_path.write_bytes(b"")


def stranded(run: RunDir) -> None:
    write_status(run, Status(state="queued", at=1.0, step=2))


def zeros_in_events(run: RunDir) -> None:
    lines = run.events_path.read_bytes().splitlines(keepends=True)
    lines[2] = bytes(50) + lines[2]
    lines.insert(3, b"\xff{\n")
    run.events_path.write_bytes(b"".join(lines))


def foreign_line_in_events(run: RunDir) -> bytes:
    content = run.events_path.read_bytes() + b"\xff{\n"
    run.events_path.write_bytes(content)
    return content


def no_recipe(run: RunDir) -> None:
    run.recipe_path.unlink()


def half_an_evaluation(run: RunDir) -> None:
    run.task_evaluation_path.write_text('{"run": "a", "rows": [')


DAMAGES: list[tuple[Callable[[RunDir], None], str, str]] = [
    (damaged_weights, "adapter: adapter_model.safetensors has changed since it was written", "failed"),
    (no_adapter, "adapter: the folder is missing", "failed"),
    (adapter_moved_aside, "adapter was moved to .adapter.part/earlier", "finished"),
    (checkpoint_moved_aside, "step-2 was moved to .step-2.part/earlier", "finished"),
    (damaged_checkpoint, "checkpoint of step 2: optimizer.pt has changed since it was written", "finished"),
    (no_status, "status.json is missing", "finished"),
    (empty_status, "status.json cannot be read", "finished"),
    (stranded, "the status is queued, but the run is not in the queue", "stopped"),
    (zeros_in_events, "events.jsonl has 2 damaged lines", "finished"),
    (no_recipe, "recipe.toml", "finished"),
    (half_an_evaluation, "task_evaluation.json cannot be read", "finished"),
]


@pytest.mark.parametrize(("damage", "what", "state"), DAMAGES, ids=[d[0].__name__ for d in DAMAGES])
def test_damage_is_named_and_repaired(
    finished: RunDir, recipe: Recipe, damage: Callable[[RunDir], None], what: str, state: str
) -> None:
    assert check_run(finished).defects == ()
    damage(finished)
    checked = check_run(finished)
    (defect,) = checked.defects
    assert defect.what.startswith(what) and defect.remedy
    again, done = apply_repairs(checked, partial(check_run, finished))
    assert again.defects == () and len(done) == 1, done
    assert read_status(finished).state == state
    assert finished.recipe() == recipe
    if state != "finished":
        actions.resume(finished)
        assert run_queue.waiting() == [finished.id]


def test_a_repair_keeps_what_it_replaces(finished: RunDir) -> None:
    for damage in (damaged_weights, damaged_checkpoint, zeros_in_events):
        damage(finished)
    finished.recipe_path.write_text("lora = 3\n")
    apply_repairs(check_run(finished), partial(check_run, finished))
    names = {path.name for path in (*finished.path.iterdir(), *finished.checkpoints_dir.iterdir())}
    assert {"damaged-adapter", "damaged-step-2", "damaged-events.jsonl", "damaged-recipe.toml"} <= names


def test_a_recipe_is_restored_from_a_checkpoint_without_an_adapter(run: RunDir, recipe: Recipe) -> None:
    reporter = story.begin(run)
    story.train(run, reporter, 1)
    story.pause(run, reporter, 1)
    run.recipe_path.write_bytes(b"")
    apply_repairs(check_run(run), partial(check_run, run))
    assert run.recipe() == recipe


def test_a_lost_run_without_a_status_is_recorded_as_failed(run: RunDir) -> None:
    story.begin(run).stop()
    run.status_path.unlink()
    run.heartbeat_path.unlink()
    again, _ = apply_repairs(check_run(run), partial(check_run, run))
    assert again.defects == () and read_status(run).state == "failed"


def test_a_run_in_training_is_left_alone(finished: RunDir) -> None:
    write_status(finished, Status(state="running", at=1.0, process=process_identity()))
    no_adapter(finished)
    checked = check_run(finished)
    assert checked.in_training and not checked.defects


def repair(run: RunDir) -> list[str]:
    return apply_repairs(check_run(run), partial(check_run, run))[1]


def events_of(run: RunDir) -> list[AnyEvent]:
    return list(EventTail(run.events_path).drain())


@pytest.mark.parametrize("at", range(1, 12))
def test_a_full_disk_during_a_repair_loses_no_history(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before = events_of(finished)
    foreign_line_in_events(finished)
    checked = check_run(finished)
    with monkeypatch.context() as full:
        FaultyDisk(full, at, errno.ENOSPC, lasting=True)
        apply_repairs(checked, partial(check_run, finished))
    assert events_of(finished) == before
    repair(finished)
    assert check_run(finished).defects == () and events_of(finished) == before


def test_history_that_a_killed_repair_moved_aside_comes_back(finished: RunDir) -> None:
    before = events_of(finished)
    foreign_line_in_events(finished)
    finished.events_path.rename(finished.path / "damaged-events.jsonl")
    repair(finished)
    assert check_run(finished).defects == () and events_of(finished) == before
    assert read_status(finished).state == "finished"


def test_a_run_resumed_after_its_check_is_not_repaired(run: RunDir) -> None:
    reporter = story.begin(run)
    story.train(run, reporter, 1, 2)
    story.pause(run, reporter, 2)
    zeros_in_events(run)
    checked = check_run(run)
    actions.resume(run)
    reporter = story.begin(run)
    story.train(run, reporter, 3)
    (said,) = apply_repairs(checked, partial(check_run, run))[1]
    assert said == "left alone: it is running"
    story.finish(run, reporter, 4)
    assert isinstance(last_event(run.events_path), Finished)
    assert not (run.path / "damaged-events.jsonl").exists()


def test_a_run_that_waits_is_not_repaired(run: RunDir) -> None:
    run_queue.enqueue(run)
    damaged = foreign_line_in_events(run)
    assert repair(run) == ["left alone: it is queued"]
    assert run.events_path.read_bytes() == damaged


def test_a_run_whose_trainer_still_exits_is_not_repaired(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_tui.runs.check.PATIENCE_S", 0.0)
    no_adapter(finished)
    with locked(finished.trainer_lock_path):
        (said,) = repair(finished)
    assert said == "left alone: a trainer still uses the run" and read_status(finished).state == "finished"


def test_the_second_of_two_repairs_does_nothing(finished: RunDir) -> None:
    damaged_weights(finished)
    first, second = check_run(finished), check_run(finished)
    apply_repairs(first, partial(check_run, finished))
    (said,) = apply_repairs(second, partial(check_run, finished))[1]
    assert said == "left alone: the run has changed since it was checked"
    assert sum(isinstance(event, Failed) for event in events_of(finished)) == 1


def test_a_repair_that_fails_says_why(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_checkpoint(finished)
    checked = check_run(finished)

    def fails(self: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", fails)
    again, done = apply_repairs(checked, partial(check_run, finished))
    assert again.defects == checked.defects and "Read-only file system" in done[0]


def test_runs_that_are_gone_are_taken_out_of_the_queue(finished: RunDir) -> None:
    queue_path().write_text('["gone-20260101"]')
    again, done = apply_repairs(check_queue(), check_queue)
    assert done == ["removed from the queue"] and run_queue.waiting() == [] and again.defects == ()


def test_leftovers_are_deleted(finished: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Leftovers of this machine are not the test's.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draft = killed(draft_path(paths.runs_dir() / "x"))
    assert [str(draft) in defect.what for defect in check_leftovers().defects] == [True]
    again, _ = apply_repairs(check_leftovers(), check_leftovers)
    assert again.defects == () and not draft.exists() and leftovers.sweep() == []
