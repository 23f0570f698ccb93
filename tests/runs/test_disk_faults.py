"""The n-th write fails, for every n: no run is lost, and none ends that could go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import pytest

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, leftovers, run_queue
from qlora_tui.runs.damage import adapter_damage, checkpoint_damage
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.event_log import EventTail, last_event
from qlora_tui.runs.events import Step
from qlora_tui.runs.status import ACTIVE, RESUMABLE, read_status
from tests.runs import story
from tests.support.power import FaultyDisk

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are queued again only wait."""
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr("qlora_tui.training.reporter.HEARTBEAT_S", 1e6)


@contextmanager
def fault(monkeypatch: pytest.MonkeyPatch, at: int, code: int, *, lasting: bool) -> Iterator[FaultyDisk]:
    """The ``at``-th write from here on fails, and with ``lasting`` every one after it."""
    with monkeypatch.context() as faulty:
        yield FaultyDisk(faulty, at, code, lasting=lasting)


for_a_while_or_for_good = pytest.mark.parametrize(
    ("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)]
)


@for_a_while_or_for_good
def test_a_run_is_created_whole_or_not_at_all(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    for at in count(1):
        before = len(all_runs())
        with fault(monkeypatch, at, code, lasting=lasting) as disk, suppress(UserError):
            create_run(recipe)
        for run in all_runs():
            assert run.recipe() == recipe
        assert all(path.name[0] != "." for path in paths.runs_dir().iterdir()), "no draft is left"
        if not disk.has_failed:
            assert len(all_runs()) == before + 1 and at > 8
            return


@for_a_while_or_for_good
def test_a_run_that_cannot_be_queued_can_be_queued_later(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    for at in count(1):
        run = create_run(recipe)
        with fault(monkeypatch, at, code, lasting=lasting) as disk:
            try:
                run_queue.enqueue(run)
                assert run.id in run_queue.waiting()
            except OSError:
                assert_queued_or_ended(run)
        assert_waits_after_resume(run)
        if not disk.has_failed:
            assert at > 5
            return


def assert_queued_or_ended(run: RunDir) -> None:
    assert (read_status(run).state == "queued") == (run.id in run_queue.waiting())


def assert_waits_after_resume(run: RunDir) -> None:
    state = read_status(run).state
    if state in RESUMABLE:
        actions.resume(run)
        state = read_status(run).state
    assert state == "queued" and run.id in run_queue.waiting()
    run_queue.remove(run)


@for_a_while_or_for_good
def test_a_paused_run_can_be_resumed_after_a_failed_resume(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    for at in count(1):
        run = story.submitted(recipe)
        story.pause(run, story.begin(run), 3)
        with fault(monkeypatch, at, code, lasting=lasting) as disk, suppress(UserError):
            actions.resume(run)
        assert read_status(run).step == 3
        assert_queued_or_ended(run)
        assert_waits_after_resume(run)
        if not disk.has_failed:
            return


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_fault_in_training_costs_at_most_its_checkpoint(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for at in count(1):
        run = story.submitted(recipe)
        reporter = story.begin(run)
        story.train(run, reporter, 1)
        failures = 0
        with fault(monkeypatch, at, code, lasting=False) as disk:
            for step in (2, 3):
                try:
                    story.train(run, reporter, step)
                except OSError:
                    failures += 1
        assert failures <= 1
        assert read_status(run).state in ACTIVE
        assert len(run.checkpoints()) >= 2
        assert all(checkpoint_damage(folder) is None for _, folder in run.checkpoints())
        story.finish(run, reporter, 3)
        steps = [event.step for event in EventTail(run.events_path).drain() if isinstance(event, Step)]
        assert steps == [1, 2, 3], "each event once"
        assert read_status(run).state == "finished" and adapter_damage(run.adapter_dir) is None
        if not disk.has_failed:
            assert at > 20
            return


@for_a_while_or_for_good
def test_a_fault_at_the_end_leaves_a_usable_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, code: int, lasting: bool
) -> None:
    for at in count(1):
        run = story.submitted(recipe)
        reporter = story.begin(run)
        story.train(run, reporter, 1)
        story.finish(run, reporter, 1)
        reporter = story.begin(run)
        with fault(monkeypatch, at, code, lasting=lasting) as disk, suppress(OSError):
            story.finish(run, reporter, 2)
        reporter.stop()
        leftovers.restore(run)
        assert adapter_damage(run.adapter_dir) is None, "the earlier one or the new one"
        ended = type(last_event(run.events_path)).__name__ == "Finished"
        monkeypatch.setenv("QLORA_TUI_BOOT_ID", f"boot {at}")
        assert ended or read_status(run).state == "lost", "the runner records its end, and resume goes on"
        assert [step for step, _ in run.checkpoints()] == [1]
        if not disk.has_failed:
            return
