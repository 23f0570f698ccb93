"""A run as lines: sampled if it is long, sentences for screen readers, a note for another version."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from qlora_tui.cli import follow
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Finished, Health
from qlora_tui.runs.status import Status, write_status
from tests.cli.conftest import Call
from tests.support.polling import while_it_sleeps
from tests.support.step_events import a_step
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run


def test_a_long_run_prints_a_sample_and_json_prints_everything(call: Call) -> None:
    run = write_fake_run(FakeRun(state="finished", steps=8000, total=8000))
    said = call("attach", run.id)
    steps = [line for line in said.out.splitlines() if "  lr " in line]
    assert 1500 < len(steps) < 2500
    assert "step 8,000 of 8,000" in steps[-1] and "finished" in said.out
    assert "of 8,000 steps" in said.err
    assert call("attach", run.id, "--json").out.count('"event":"step"') == 8000


def test_attach_without_a_name_prefers_the_running_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    running = write_fake_run(FakeRun(name="older", state="running", steps=5))
    write_fake_run(FakeRun(name="newest", state="stopped", steps=7, began=BEGAN + 60))
    monkeypatch.setattr(follow, "follow_events", lambda view, on_silence: iter(()))
    assert running.id in call("attach").err
    write_status(running, Status(state="paused", at=BEGAN))
    assert "stopped at step 7" in call("attach").out


def test_plain_says_in_sentences_what_the_live_screen_shows(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "PLAIN_INTERVAL_S", 0.0)
    run = write_fake_run(FakeRun(steps=640, nan=range(30, 33), health=True))

    def go_on() -> None:
        with EventWriter(run.events_path) as log:
            log.append(a_step(641, at=BEGAN, loss=1.5))
            log.append(
                Health(at=BEGAN, kind="throttled", severity="warning", evidence="Hot.", remedy="Wait.")
            )
            log.append(Finished(at=BEGAN, step=641, seconds=9.0, tokens_per_s=9.0))
        write_status(run, Status(state="finished", at=BEGAN))

    # It waits when it has said how the run stands.
    while_it_sleeps(monkeypatch, go_on)
    said = call("attach", run.id, "--plain")
    first = said.out.splitlines()[0]
    assert first.startswith(f"{run.id}: training, step 640 of 3,000, loss ")
    assert "validation loss" in first and "Not responding" in first and "GPU 9" in first and "61 °C." in first
    assert said.out.count("not a number") == 1 and "Lower Learning rate" in said.out
    assert "step 641 of 3,000, loss 1.5" in said.out
    assert "warning: Hot. Wait." in said.out and "finished at step 641" in said.out
    assert "\x1b" not in said.out and "\r" not in said.out
    assert said.code == 0


def test_a_run_that_is_deleted_meanwhile_is_said(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_run(FakeRun(state="running", steps=5))
    while_it_sleeps(monkeypatch, partial(shutil.rmtree, run.path, ignore_errors=True))
    said = call("attach", run.id)
    assert said.code == 1
    assert "The run was deleted" in said.err and "resume" not in said.err
