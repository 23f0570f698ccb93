"""The power fails at any moment of a run's life; see :mod:`tests.support.power`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.publishing import earlier_path
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, check, leftovers, run_queue
from qlora_tui.runs.check import apply_repairs, check_run
from qlora_tui.runs.damage import adapter_damage, checkpoint_damage
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.event_log import EventTail, EventWriter, last_event
from qlora_tui.runs.events import CheckpointSaved, Paused, Started
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import RESUMABLE, read_status
from tests.runs import story
from tests.runs.damage import put_adapter
from tests.support.power import MODES, Disk

pytestmark = pytest.mark.slow

Work = Callable[[], object]


def repair_adapter(run: RunDir) -> Path:
    return check.move_aside(run.adapter_dir)


@pytest.fixture(autouse=True)
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are queued again only wait."""
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr("qlora_tui.training.reporter.HEARTBEAT_S", 1e6)


@pytest.fixture
def cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], Iterator[str]]:
    """Do some work, then yield the state folder as each cut leaves it, with a label of the cut."""

    def cuts(work: Work) -> Iterator[str]:
        state = paths.state_dir()
        paths.runs_dir()
        disk = Disk(state)
        with monkeypatch.context() as watched:
            disk.watch(watched)
            work()
        after = tmp_path / "after"
        monkeypatch.setenv("XDG_STATE_HOME", str(after))
        monkeypatch.setenv("QLORA_TUI_BOOT_ID", "after the cut")
        after.mkdir()
        for call, mode in disk.cuts(after / state.name):
            yield f"{mode}, after {call}"
        disk.close()

    return cuts


def assert_nothing_is_lost(cut: str) -> None:
    """Every run is finished and whole, waits, or can be resumed from the last checkpoint it announced."""
    for run in all_runs():
        leftovers.restore(run)
        run.recipe()
        status = read_status(run)
        if status.state == "finished":
            assert adapter_damage(run.adapter_dir) is None, cut
        if run.adapter_dir.exists():
            assert adapter_damage(run.adapter_dir) is None, cut
        announced = [e.step for e in EventTail(run.events_path).drain() if isinstance(e, CheckpointSaved)]
        if announced:
            assert checkpoint_damage(run.checkpoints_dir / f"step-{announced[-1]}") is None, cut
        assert all(checkpoint_damage(folder) is None for _, folder in run.checkpoints()), cut
        if status.state in RESUMABLE:
            actions.resume(run)
            status = read_status(run)
        assert status.state in ("queued", "finished"), (cut, status)
        assert (run.id in run_queue.waiting()) == (status.state == "queued"), cut
    known = {run.id for run in all_runs()}
    assert all(waiting in known for waiting in run_queue.waiting()), cut


def test_a_submitted_run_waits_after_any_cut(recipe: Recipe, cuts: Callable[[Work], Iterator[str]]) -> None:
    seen = {}
    for cut in cuts(lambda: story.submitted(recipe)):
        assert_nothing_is_lost(cut)
        seen[cut.partition(",")[0]] = run_queue.waiting()
    assert all(seen.values()), "once it is submitted it waits, whatever happens"


def test_a_run_is_never_lost_between_queue_and_end(
    recipe: Recipe, cuts: Callable[[Work], Iterator[str]]
) -> None:
    run = story.submitted(recipe)

    def work() -> None:
        reporter = story.begin(run)
        story.train(run, reporter, 1, 2, 3)
        story.finish(run, reporter, 3)

    last = {}
    for cut in cuts(work):
        here = RunDir(paths.runs_dir() / run.id)
        last[cut.partition(",")[0]] = read_status(here).state
        assert_nothing_is_lost(cut)
    assert set(last.values()) == {"finished"}


def test_a_paused_run_is_never_lost_while_resumed_and_trained(
    recipe: Recipe, cuts: Callable[[Work], Iterator[str]]
) -> None:
    run = story.submitted(recipe)
    reporter = story.begin(run)
    story.train(run, reporter, 1, 2)
    story.finish(run, reporter, 2)
    story.pause(run, story.begin(run), 2)

    def work() -> None:
        actions.resume(run)
        again = story.begin(run)
        # The same step again, as after an attempt that was cut off.
        story.train(run, again, 2, 3)
        story.finish(run, again, 3)

    for cut in cuts(work):
        here = RunDir(paths.runs_dir() / run.id)
        assert here.path.exists() and len(here.checkpoints()) >= 1, cut
        leftovers.restore(here)
        assert here.adapter_dir.exists(), (cut, "the earlier adapter, or the new one")
        assert any(isinstance(event, Started) for event in EventTail(here.events_path).drain())
        assert_nothing_is_lost(cut)


def test_a_withdrawn_run_stays_withdrawn_or_waits(
    recipe: Recipe, cuts: Callable[[Work], Iterator[str]]
) -> None:
    run = story.submitted(recipe)
    states = set()
    for cut in cuts(lambda: run_queue.cancel(run)):
        states.add(read_status(RunDir(paths.runs_dir() / run.id)).state)
        assert_nothing_is_lost(cut)
    assert states == {"queued", "stopped"}


def test_a_repair_loses_no_history_wherever_it_is_cut(
    recipe: Recipe, cuts: Callable[[Work], Iterator[str]]
) -> None:
    run = story.submitted(recipe)
    reporter = story.begin(run)
    story.train(run, reporter, 1, 2)
    story.finish(run, reporter, 2)
    before = list(EventTail(run.events_path).drain())
    with run.events_path.open("ab") as file:
        file.write(b"\xff{\n")

    for cut in cuts(lambda: apply_repairs(check_run(run), partial(check_run, run))):
        here = RunDir(paths.runs_dir() / run.id)
        assert list(EventTail(here.events_path).drain()) == before, cut
        apply_repairs(check_run(here), partial(check_run, here))
        assert check_run(here).defects == (), cut
        copies = [path.read_bytes() for path in here.path.glob("damaged-*events.jsonl")]
        assert any(content.endswith(b"\xff{\n") for content in copies), cut


def test_a_taken_run_waits_or_has_started_after_any_cut(
    recipe: Recipe, cuts: Callable[[Work], Iterator[str]]
) -> None:
    run = story.submitted(recipe)
    for cut in cuts(lambda: run_queue.take(run, process_identity())):
        assert read_status(RunDir(paths.runs_dir() / run.id)).state in ("queued", "lost"), cut


def test_a_runs_last_event_is_synced_at_once(recipe: Recipe, cuts: Callable[[Work], Iterator[str]]) -> None:
    run = create_run(recipe)
    ending = Paused(at=1.0, step=2)

    def work() -> None:
        with EventWriter(run.events_path) as log:
            log.append(ending)

    last = {}
    for cut in cuts(work):
        last[cut.partition(",")[0]] = last_event(RunDir(paths.runs_dir() / run.id).events_path)
    assert last == dict.fromkeys(MODES, ending)


def test_a_new_name_is_on_the_disk_at_once(recipe: Recipe, cuts: Callable[[Work], Iterator[str]]) -> None:
    run = create_run(recipe)
    last = {}
    for cut in cuts(lambda: actions.rename(run, "owls")):
        name = RunDir(paths.runs_dir() / run.id).name
        assert name in (run.id, "owls"), cut
        last[cut.partition(",")[0]] = name
    assert last == dict.fromkeys(MODES, "owls")


@pytest.mark.parametrize("work", [leftovers.restore, repair_adapter])
def test_what_is_moved_stays_moved_after_a_cut(
    run: RunDir, cuts: Callable[[Work], Iterator[str]], work: Callable[[RunDir], object]
) -> None:
    put_adapter(earlier_path(run.adapter_dir) if work is leftovers.restore else run.adapter_dir)
    last = {}
    for cut in cuts(partial(work, run)):
        names = {path.name for path in RunDir(paths.runs_dir() / run.id).path.iterdir()}
        last[cut.partition(",")[0]] = names & {"adapter", "damaged-adapter"}
    moved = "adapter" if work is leftovers.restore else "damaged-adapter"
    assert last == {mode: {moved} for mode in MODES}
