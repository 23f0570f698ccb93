"""The same on real file systems: the image of a mounted disk is copied in mid-work, and the copy mounted.

The copy is what the disk held at that moment, as after a power cut; mounting it replays its journal. Needs
root, loop devices and the file system's tools; what is missing is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions
from qlora_tui.runs.damage import adapter_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.status import read_status
from tests.runs import story
from tests.runs.test_power_cut import assert_nothing_is_lost

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk"),
]
_MIB = {"ext4": 64, "xfs": 320, "btrfs": 128}


@pytest.fixture(autouse=True)
def skip_fsync() -> None:
    """Keep the real fsync, which the cuts here depend on."""


@pytest.fixture(params=list(_MIB))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with an empty file system in it; skipped where this machine cannot make or mount one."""
    kind = str(request.param)
    tool = shutil.which(f"mkfs.{kind}")
    if tool is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    file = tmp_path / "disk"
    with file.open("wb") as disk:
        disk.truncate(_MIB[kind] << 20)
    subprocess.run([tool, "-q", str(file)], check=True, capture_output=True)
    try:
        with mounted(file, tmp_path / "try"):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no {kind} can be mounted here: {error.stderr.decode().strip()}")
    return file


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[None]:
    """Mount an image for a while."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_no_run_is_lost_on_a_real_file_system(
    image: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr("qlora_tui.training.reporter.HEARTBEAT_S", 1e6)
    disk = tmp_path / "state"
    copies: list[Path] = []

    def cut() -> None:
        copy = tmp_path / f"cut-{len(copies)}"
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        copies.append(copy)

    monkeypatch.setenv("XDG_STATE_HOME", str(disk))
    with mounted(image, disk):
        run = story.submitted(recipe)
        cut()
        reporter = story.begin(run)
        cut()
        for step in (1, 2, 3):
            story.train(run, reporter, step)
            reporter.write_heartbeat()
            cut()
        story.finish(run, reporter, 3)
        cut()
    monkeypatch.setenv("QLORA_TUI_BOOT_ID", "after the cut")
    states = []
    for copy in copies:
        with mounted(copy, disk):
            here = RunDir(paths.runs_dir() / run.id)
            states.append(read_status(here).state)
            if states[-1] == "lost":
                announced = [step for step, _ in here.checkpoints()]
                assert announced[-1:] == [len(states) - 2] or len(states) == 2
            assert_nothing_is_lost(copy.name)
            assert states[-1] != "finished" or adapter_damage(here.adapter_dir) is None
    assert states == ["queued", "lost", "lost", "lost", "lost", "finished"]
