"""What version 0.1 wrote opens without loss: a run, its events, its checkpoint, its adapter, a preset."""

from __future__ import annotations

import json
import shutil
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.recipe.aliases import canonical_value
from qlora_tui.recipe.fields import fields, get_setting, sections
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import load, to_recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import decode
from qlora_tui.runs.status import read_status
from qlora_tui.runs.view import RunView
from qlora_tui.training import checkpoints

RECORDED = Path(__file__).parent / "v0_1"


@pytest.fixture
def run() -> RunDir:
    """The recorded run, among the runs of this home."""
    folder = paths.runs_dir() / "tiny-rows-20261126-1000"
    shutil.copytree(RECORDED / "run", folder)
    return RunDir(folder)


def test_a_run_is_listed_and_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["attach", run.id]) == 0
    assert "step 30 of 30" in capsys.readouterr().out


def test_every_file_of_a_run_is_whole(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not what killed processes of other tests left.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["runs", "check"]) == 0, capsys.readouterr().out


def test_status_and_events_are_read_to_the_last(run: RunDir) -> None:
    assert read_status(run).state == "finished"
    view = RunView(run)
    assert len(list(view.iter_new())) == len(run.events_path.read_text().splitlines())
    assert view.step == 30 and view.ending is not None


def test_a_checkpoint_can_be_resumed(run: RunDir) -> None:
    checkpoint, damage = checkpoints.latest(run)
    assert damage == [] and checkpoint is not None and checkpoint.step == 30
    checkpoints.require_unchanged(checkpoint.state, run.recipe(), checkpoint.state.data_hash)


def test_losses_since_the_best_keep_their_stored_name(run: RunDir) -> None:
    stored = json.loads((run.checkpoints_dir / "step-30" / "state.json").read_text())
    stored["last_losses"] = [6.0, 7.5]
    state = msgspec.convert(stored, checkpoints.CheckpointState)
    assert state.scores_since_best == (6.0, 7.5)
    assert json.loads(msgspec.json.encode(state))["last_losses"] == [6.0, 7.5]


def test_an_event_of_every_kind_keeps_every_value() -> None:
    path = RECORDED / "events_of_every_kind.jsonl"
    tail = EventTail(path)
    events = list(tail.drain())
    assert tail.unknown == 0
    for line, event in zip(path.read_text().splitlines(), events, strict=True):
        written = json.loads(line)
        del written["event"]
        # A field may be called otherwise today, or be new: what counts is that none of the values is lost.
        assert not Counter(_sorted(written.values())) - Counter(_values(event))
        assert decode(line.encode()) == event


def test_a_preset_keeps_every_setting() -> None:
    preset = RECORDED / "every_setting.toml"
    recipe = to_recipe(load(preset), origin=str(preset))
    written = tomllib.loads(preset.read_text())
    for section, settings in written.items():
        today = getattr(recipe, section)
        if section in sections():
            settings = {key: canonical_value(f"{section}.{key}", value) for key, value in settings.items()}
        if "sources" in settings:
            # Newer than the recording.
            settings["sources"] = [{**source, "excluded_rows": ""} for source in settings["sources"]]
        assert settings == today or not Counter(_sorted(settings.values())) - Counter(_values(today))
    default = Recipe()
    named = {f"{section}.{key}" for section in sections() for key in written.get(section, ())}
    same = {path for path in fields() if get_setting(recipe, path) == get_setting(default, path)}
    assert named and not named & same, "each was recorded with another value than its default"


def _values(struct: Struct) -> list[str]:
    return _sorted(getattr(struct, name) for name in struct.__struct_fields__)


def _sorted(values: Iterable[Any]) -> list[str]:
    return sorted(msgspec.json.encode(value, order="sorted").decode() for value in values)
