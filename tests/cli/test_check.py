from __future__ import annotations

import pytest

from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs.directory import RunDir
from tests.cli.conftest import Call
from tests.runs import story
from tests.runs.test_check import flip


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("qlora_tui.training.reporter.HEARTBEAT_S", 1e6)
    run = story.submitted(Recipe(name="owls", model=Model(id="acme/tiny")))
    reporter = story.begin(run)
    story.train(run, reporter, 1, 2)
    story.finish(run, reporter, 2)
    return run


def test_whole_runs_are_a_line_each_and_no_error(call: Call, finished: RunDir) -> None:
    said = call("runs", "check")
    assert said.code == 0
    assert said.out.splitlines()[1].split() == [finished.id, "finished", "whole"]
    assert call("runs", "check", "--json").json["problems"] == 0


def test_damage_is_an_error_until_it_is_repaired(call: Call, finished: RunDir) -> None:
    flip(finished.checkpoints_dir / "step-2/optimizer.pt", 5)
    said = call("runs", "check", "owls")
    assert said.code == 1
    assert "optimizer.pt has changed since it was written" in said.out
    assert "`qlora-tui runs check --repair`" in said.out
    checked = call("runs", "check", "--json")
    assert checked.code == 1 and checked.json["problems"] == 1
    (run,) = checked.json["runs"]
    assert (run["run"], run["state"], run["repaired"]) == (finished.id, "finished", [])
    repaired = call("runs", "check", "--repair")
    assert repaired.code == 0 and "moved it to damaged-step-2" in repaired.out
    assert call("runs", "check").code == 0


def test_without_runs_there_is_nothing_to_check(call: Call) -> None:
    said = call("runs", "check")
    assert (said.code, said.out) == (0, "No runs yet.\n")
