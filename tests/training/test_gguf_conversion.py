"""A GGUF file is converted in a process: with progress, once, stopped on request, leaving nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qlora_tui import worker
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs import control
from qlora_tui.runs.control import Kind
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Failed, Finished, Paused, PhaseChanged, Progress, Stopped
from qlora_tui.runs.status import read_status
from qlora_tui.training.gguf_conversion import (
    cached_conversion,
    convert_cached,
    convert_in_child,
    folder_of,
)
from qlora_tui.worker import JobStopped
from tests.support.polling import wait_for
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events

_JOB = "qlora_tui.training.gguf_weights:convert"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@contextmanager
def another_process_converts(folder: Path) -> Iterator[None]:
    """Hold the lock that a conversion to ``folder`` waits for."""
    lock = folder.with_name(f".{folder.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)


def converters() -> list[psutil.Process]:
    """Children of this process that convert at this moment."""
    return [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and _JOB in process.cmdline()
    ]


def test_progress_reaches_the_size_of_the_weights(file: Path, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    convert_in_child(file, tmp_path / "folder", lambda done, total: said.append((done, total)))
    done, total = said[-1]
    assert done == total
    # The header of a safetensors file comes before the weights.
    assert 0 < (tmp_path / "folder" / "model.safetensors").stat().st_size - total < 10_000


def test_a_file_is_converted_once(file: Path) -> None:
    assert cached_conversion(file) is None
    folder = convert_cached(file)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert cached_conversion(file) == convert_cached(file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    from qlora_tui.adapters.base_weights import model_folder

    said: list[str] = []
    assert model_folder(Recipe(model=Model(id=str(file))), said.append) == folder and not said


def test_what_another_process_wrote_meanwhile_is_left_alone(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    convert_in_child(file, folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_stop_ends_the_child_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with another_process_converts(folder):
        with pytest.raises(JobStopped):
            convert_in_child(file, folder, should_stop=lambda: bool(converters()))
        assert not converters()
    assert list(tmp_path.iterdir()) == [file]


def test_the_child_of_a_killed_process_ends(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    code = (
        "import sys; from pathlib import Path\n"
        "from qlora_tui.training.gguf_conversion import convert_in_child\n"
        "convert_in_child(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    with another_process_converts(folder):
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(file), f"{folder}"], env=worker.subprocess_env()
        )
        wait_for(lambda: psutil.Process(parent.pid).children())
        (child,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert not folder.exists()


def test_a_killed_child_is_a_lack_of_memory(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def kill_it() -> bool:
        for process in converters():
            process.kill()
        return False

    with another_process_converts(folder), pytest.raises(UserError, match="could not be converted") as raised:
        convert_in_child(file, folder, should_stop=kill_it)
    assert "was killed" in raised.value.what
    assert "ran out of memory" in raised.value.why


def test_an_error_in_the_child_is_reported_in_its_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more")
    with pytest.raises(UserError, match="The GGUF file cannot be used") as raised:
        convert_in_child(broken, tmp_path / "folder")
    assert "not a complete GGUF file" in raised.value.what
    assert "Download the file again" in raised.value.fix


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]


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
