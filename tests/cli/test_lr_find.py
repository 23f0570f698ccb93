"""``lr-find``: a stored test is shown again, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe.layering import build_recipe
from qlora_tui.runs import lr_range_job
from qlora_tui.runs.lr_range import LrRange, RangeSettings, stored_path, write_lr_range
from tests.cli.conftest import Call
from tests.support.lr_range_worker_stub import curve_steps
from tests.tui.sample_data import readable_model


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """The options of a recipe that has a stored test."""
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    recipe = build_recipe(model="acme/tiny", data=[str(file)])
    settings = RangeSettings()
    steps = curve_steps(settings)
    lr_range = LrRange(settings=settings, measured_at=1.0, seconds=61.0, steps=steps, diverged=True)
    write_lr_range(stored_path(recipe), lr_range)
    return ["--model", "acme/tiny", "--data", str(file)]


def test_a_stored_test_is_printed_with_its_suggestion(call: Call, options: list[str]) -> None:
    said = call("lr-find", *options, "--set", "training.learning_rate=0.01")
    assert said.code == 0
    assert "lowest" in said.out and "steps in 61 s, ended where the loss diverged" in said.out
    assert "--set training.learning_rate=" in said.out


def test_the_curve_is_printed_as_json(call: Call, options: list[str]) -> None:
    printed = call("lr-find", *options, "--json").json
    assert printed["suggested"] == pytest.approx(4e-4, rel=0.5)
    assert len(printed["rates"]) == len(printed["smoothed"]) == len(printed["steps"])
    assert {"rate", "loss", "untrained"} <= printed["steps"][0].keys()


def test_other_rates_are_measured_again(call: Call, options: list[str]) -> None:
    said = call("lr-find", *options, "--steps", "30")
    assert said.code == 2
    assert "acme/tiny" in said.err


def test_advice_for_the_length_of_a_run_is_left_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", "tests.support.lr_range_worker_stub")
    monkeypatch.setenv("LR_RANGE_STEPS", "30")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    options = ["--model", readable_model(tmp_path / "model"), "--data", str(rows)]
    said = call("lr-find", *options, "--set", "training.max_steps=2", "--set", "training.learning_rate=0.5")
    assert "30 of 60 steps" in said.out
    assert "steps" not in said.err and "Learning rate" not in said.err


def test_a_rate_that_is_none_is_explained(call: Call, options: list[str]) -> None:
    said = call("lr-find", *options, "--to", "2")
    assert said.code == 2
    assert "at most 1" in said.err
    assert "Rise from a rate" in call("lr-find", *options, "--from", "0.5").err
