"""One damaged file of one run: the run is shown as what it is, and nothing else is disabled by it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_tui.cli import main
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, control, run_queue, runner, supervision
from qlora_tui.runs.check import check_run
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventTail, last_event
from qlora_tui.runs.events import Finished, Started, encode
from qlora_tui.runs.notify import notification_for
from qlora_tui.runs.outcomes import determine_outcome
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import read_status, write_status
from qlora_tui.runs.supervision import Supervisor
from qlora_tui.runs.telemetry import EnergyMeter, TelemetryTail
from qlora_tui.runs.view import RunView
from qlora_tui.training import checkpoints
from tests.runs.damage import DEEP, FILES, WAYS, damaged


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that the runner would train; their trainers end at once."""
    ids: list[str] = []

    def train(supervisor: Supervisor, run: RunDir, *rest: object) -> int:
        run_queue.remove(run)
        ids.append(run.id)
        write_status(run, read_status(run).transition("starting", process=process_identity()))
        with run.events_path.open("ab") as events:
            events.write(encode(Started(at=1.0, attempt=1, pid=1)))
            events.write(encode(Finished(at=2.0, step=1, seconds=1.0, tokens_per_s=1.0)))
        return 0

    monkeypatch.setattr(Supervisor, "_train", train)
    monkeypatch.setattr(supervision, "start_detached", lambda *arguments, **options: None)
    return ids


@pytest.mark.parametrize("file", FILES)
@pytest.mark.slow
def test_damage_to_one_run_disables_no_reader(
    recipe: Recipe,
    taken: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    monkeypatch.setattr("qlora_tui.runs.describe.POLL_S", 0)
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    runs = [damaged(recipe, "running", file, how) for how in WAYS]
    other = create_run(recipe)
    run_queue.enqueue(other)

    assert main(["runs"]) == 0
    assert other.id in capsys.readouterr().out
    assert main(["runs", "--json"]) == 0
    shown = {shown["run"] for shown in json.loads(capsys.readouterr().out)["runs"]}
    assert shown == {run.id for run in (*runs, other)}
    for run in runs:
        for words in (["attach"], ["attach", "--json"], ["attach", "--plain"]):
            main([*words, run.id])
        list(EventTail(run.events_path).drain())
        last_event(run.events_path)
        RunView(run).refresh()
        TelemetryTail(run.telemetry_path).poll()
        EnergyMeter(run.telemetry_path).read_all()
        notification_for(run)
        determine_outcome(run, 1)
        control.take_requests(run)
        checkpoints.latest(run)
        check_run(run)
        with suppress(OSError, UserError):
            actions.resume(run)
            actions.stop(run)
    assert "Internal error" not in capsys.readouterr().err

    assert runner.main() == 0
    assert taken == [other.id]
    assert read_status(other).state == "finished"


def test_what_is_damaged_is_shown_as_what_it_is(recipe: Recipe) -> None:
    unread = damaged(recipe, "finished", "status.json", "deep nesting")
    assert read_status(unread).state == "finished", "its events say so"
    assert read_status(damaged(recipe, "finished", "events.jsonl", "one bad byte")).state == "finished"
    view = RunView(damaged(recipe, "finished", "events.jsonl", "an absurd time"))
    view.refresh()
    assert view.unknown_events == 4


def test_damaged_notes_of_the_app_are_forgotten(tmp_path: Path) -> None:
    from qlora_tui.tui import ui_state

    ui_state.add_recent("data", tmp_path)
    for content in (b'["\xff"]', DEEP, b'["\\u0000", "' + b"x" * 5000 + b'"]'):
        ui_state._file().write_bytes(content)
        assert ui_state.recent_paths("data") == []
    ui_state.add_recent("data", tmp_path)
    assert ui_state.recent_paths("data") == [tmp_path]
