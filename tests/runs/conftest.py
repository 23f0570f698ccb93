"""A run to play with: no model, no data, just a recipe and a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.support.played_trainer import install_played_trainer
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs.directory import RunDir, create_run


def let_go(run: RunDir) -> None:
    """Have a trainer that waits, and is running by now, go on to its end."""
    (run.path / "go").write_text("go")


def launch_of(run: RunDir) -> tuple[int, list[str], dict[str, str]]:
    """Process number, command and environment of the last trainer of a run, or of its torchrun."""
    number, command, environ = json.loads((run.path / "launch.json").read_text())
    return number, command, environ


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="tickets",
        model=Model(id="acme/tiny"),
        data=Data(sources=(Source(path="tickets.jsonl"),)),
    )


@pytest.fixture
def run(recipe: Recipe) -> RunDir:
    return create_run(recipe)


@pytest.fixture
def played_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers are played, in every process a test starts."""
    monkeypatch.setenv("PYTHONPATH", install_played_trainer(tmp_path))
