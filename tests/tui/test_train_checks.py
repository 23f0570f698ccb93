"""What is looked at before a launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.data.inspection import inspect
from qlora_tui.data.quick_check import QuickCheckResult
from qlora_tui.files import private_dir
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs.status import read_status
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train_checks import LaunchCheck, check_all
from qlora_tui.tui.system_status import SystemStatus
from tests.tui.played import Play, play
from tests.tui.reading import readable_model


def test_the_checks_name_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    app = QloraApp()
    recipe = Recipe(
        model=Model(id="acme/nothing"), data=Data(sources=(Source(path=str(tmp_path / "none.jsonl")),))
    )
    found = {
        check.name: check
        for check in check_all(recipe, app.memory_budget, SystemStatus(no_gpu_reason="No driver."))
    }
    assert found["model"].outcome == "error" and "Download it" in found["model"].fix
    assert found["data"].outcome == "error" and "does not exist" in found["data"].text
    assert found["card"].outcome == "warning" and "No driver." in found["card"].text
    assert found["disk"].outcome == "ok"
    assert "starts at once" in found["turn"].text


def test_the_checks_warn_of_samples_beyond_the_models_context(tmp_path: Path) -> None:
    recipe = Recipe(model=Model(id=readable_model(tmp_path)), data=Data(max_length=8193))
    found = {check.name: check for check in check_all(recipe, QloraApp().memory_budget, SystemStatus())}
    assert found["length"].outcome == "warning"
    assert "the model's context is 8,192" in found["length"].text
    assert found["length"].fix == "Set data.max_length to 8,192 or less."


def test_the_checks_read_the_data_and_say_who_is_before_in_the_queue(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    run = play(Play(steps=5))
    pulse = SystemStatus(active=run, active_status=read_status(run), waiting=("other",))
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    found = {check.name: check for check in check_all(recipe, QloraApp().memory_budget, pulse)}
    assert found["data"] == LaunchCheck(
        "data", "ok", f"tickets.jsonl, {rows.stat().st_size} B, prompt-completion."
    )
    assert found["turn"].outcome == "warning"
    assert f"{run.id} and 1 more" in found["turn"].text


def test_a_mended_file_is_looked_at_again_and_a_validation_file_too(tmp_path: Path) -> None:
    rows, held = tmp_path / "tickets.jsonl", tmp_path / "held.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    rows.write_text(good + "{bad\n")
    held.write_text(good)
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),), validation_path=str(held)))
    assert _data_check(recipe).outcome == "error"
    rows.write_text(good)
    assert _data_check(recipe).outcome == "ok"
    held.write_text(good * 2 + "{bad\n")
    found = _data_check(recipe)
    assert found.outcome == "error" and "held.jsonl, row 3" in found.text


def test_what_an_inspection_has_met_is_found_however_far_down_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = QuickCheckResult(False, ())
    monkeypatch.setattr("qlora_tui.tui.screens.train_checks.quick_check", lambda files, data: unseen)
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2 + "{bad\n")
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    assert _data_check(recipe).outcome == "ok"
    inspect(recipe.data.sources[0])
    found = _data_check(recipe)
    assert found.outcome == "error" and "row 3" in found.text


def test_what_settings_leave_out_or_cut_is_a_warning(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("fox " * 300 + "\n\nshort\n")
    recipe = Recipe(data=Data(sources=(Source(path=str(book)),), max_length=64))
    found = _data_check(recipe)
    assert found.outcome == "warning" and found.text.startswith("Long text (1 row): One text holds")
    assert 'data.overflow = "split"' in found.fix
    split = Recipe(data=Data(sources=(Source(path=str(book)),), max_length=64, overflow="split"))
    assert _data_check(split).outcome == "ok"


def test_preferences_are_an_error_until_the_chosen_answers_are_asked_for(tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    found = _data_check(Recipe(data=Data(sources=(Source(path=str(rows)),))))
    assert found.outcome == "error" and "compares answers" in found.text
    assert 'data.preferences = "chosen"' in found.fix
    chosen = Recipe(data=Data(sources=(Source(path=str(rows)),), preferences="chosen"))
    assert _data_check(chosen).outcome == "ok"


def _data_check(recipe: Recipe) -> LaunchCheck:
    return next(
        check for check in check_all(recipe, QloraApp().memory_budget, SystemStatus()) if check.name == "data"
    )


def test_a_dataset_of_the_hub_is_no_missing_file(tmp_path: Path) -> None:
    recipe = Recipe(data=Data(sources=(Source(path="owner/set"),)))

    def data_check() -> LaunchCheck:
        return {check.name: check for check in check_all(recipe, QloraApp().memory_budget, SystemStatus())}[
            "data"
        ]

    check = data_check()
    assert (check.outcome, "fetches from the hub" in check.text) == ("ok", True)
    assert "checks them when it starts" in check.text

    fetched = tmp_path / "set-train.arrow"
    fetched.write_bytes(b"x" * 2048)
    note = private_dir(paths.cache_dir() / "datasets") / "owner--set.json"
    note.write_text(json.dumps({"files": [str(fetched)], "split": "train"}))
    assert data_check().text.startswith("owner/set, 2 KiB, arrow.")
