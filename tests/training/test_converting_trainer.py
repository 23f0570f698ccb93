"""A trainer whose model is a GGUF file: it shows the conversion, and stops it on request."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from qlora_tui.runs import control
from qlora_tui.runs.control import Kind
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Failed, Finished, Paused, PhaseChanged, Progress, Stopped
from qlora_tui.runs.status import read_status
from qlora_tui.training.gguf_conversion import cached_conversion, folder_of
from tests.support.polling import wait_for
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events

pytestmark = pytest.mark.slow


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def phases(run: RunDir) -> list[str]:
    return [event.phase for event in events(run) if isinstance(event, PhaseChanged)]


def test_only_the_first_run_converts_the_file(recipe: MakeRecipe, trainers: Trainers, file: Path) -> None:
    first, second = (create_run(recipe({"model.id": str(file), "training.max_steps": 1})) for _ in range(2))
    assert trainers.run(first) == trainers.run(second) == 0
    assert isinstance(events(first)[-1], Finished)
    assert phases(first)[:3] == ["loading", "loading", "converting"]
    assert [e.done for e in events(first) if isinstance(e, Progress) and e.phase == "converting"][-1] == 100
    assert "converting" not in phases(second)


@pytest.mark.parametrize(("request_", "ending"), [("stop", Stopped), ("pause", Paused)])
def test_a_request_is_honored_while_the_file_is_converted(
    recipe: MakeRecipe,
    trainers: Trainers,
    file: Path,
    request_: Kind,
    ending: type[Stopped] | type[Paused],
) -> None:
    run = create_run(recipe({"model.id": str(file)}))
    folder = folder_of(file)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        trainer = trainers.start(run)
        wait_for(lambda: read_status(run).phase == "converting")
        control.send_request(run, request_)
        assert trainer.wait() == 0
    assert isinstance(events(run)[-1], ending)
    assert cached_conversion(file) is None


def test_a_failed_conversion_ends_the_run_with_the_reason(
    recipe: MakeRecipe, trainers: Trainers, file: Path
) -> None:
    # The header says that the weights are there, and they are not.
    file.write_bytes(file.read_bytes()[:-20_000])
    run = create_run(recipe({"model.id": str(file)}))
    assert trainers.run(run) == 1
    ending = events(run)[-1]
    assert isinstance(ending, Failed)
    assert ending.title == "The GGUF file could not be converted"
    assert str(file) in ending.what
    assert cached_conversion(file) is None
