"""Rows of the drill: the power goes while a real trainer writes to a real file system.

The state folder is a disk image mounted through a loop device. A copy of the image is what the disk holds at
that moment, as after a power cut; mounting the copy replays the file system's journal. Needs root, loop
devices and ``mkfs`` of the file system.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.drill import runs
from bench.drill.program import Failure
from qlora_tui.runs.damage import adapter_damage, checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.status import read_status

MIB = {"ext4": 128, "xfs": 320, "btrfs": 256}
"""Size of the image, by file system."""
_AFTER_THE_END_S = 16.0
"""A kernel may keep finished files in memory for half a minute."""


def obstacle() -> str:
    """Why this machine cannot cut the power; empty where it can."""
    if os.geteuid() != 0:
        return "only root may mount a disk"
    missing = [f"mkfs.{kind}" for kind in MIB if shutil.which(f"mkfs.{kind}") is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def cut_while_active(kind: str) -> Callable[[random.Random, Path, Path], None]:
    """An attempt: the power goes at a random moment of a run, which is then resumed to its end."""

    def attempt(luck: random.Random, materials: Path, home: Path) -> None:
        with _mounted_state(kind, home) as image, runs.started(materials, home) as run:
            if luck.random() < 0.7:
                runs.wait_for_step(run, luck.randint(1, runs.STEPS - 2))
            time.sleep(luck.uniform(0, 0.5))
            _copy(image, home / "cut")
        with _after_the_cut(home) as state:
            cut_run = RunDir(state / "qlora-tui" / "runs" / run.id)
            for _, checkpoint in cut_run.checkpoints():
                if damage := checkpoint_damage(checkpoint):
                    raise Failure(f"{checkpoint.name} does not verify after the cut: {damage}")
            runs.resume_to_the_end(cut_run)
            runs.check_finished(cut_run)

    return attempt


def cut_after_the_end(kind: str) -> Callable[[random.Random, Path, Path], None]:
    """An attempt: the power goes within 16 s of the end of a run, which keeps its adapter."""

    def attempt(luck: random.Random, materials: Path, home: Path) -> None:
        with _mounted_state(kind, home) as image, runs.started(materials, home) as run:
            runs.wait_until(run, lambda status: status.state == "finished", "finished", every_s=0.01)
            time.sleep(luck.choice((0.0, luck.uniform(0, 1), luck.uniform(0, _AFTER_THE_END_S))))
            _copy(image, home / "cut")
        with _after_the_cut(home) as state:
            cut_run = RunDir(state / "qlora-tui" / "runs" / run.id)
            status = read_status(cut_run)
            if status.state != "finished":
                raise Failure(f"the finished run is {status.state} after the cut")
            if damage := adapter_damage(cut_run.adapter_dir):
                raise Failure(f"the adapter does not verify after the cut: {damage}")
            runs.check_finished(cut_run)

    return attempt


@contextmanager
def _mounted_state(kind: str, home: Path) -> Iterator[Path]:
    """A new file system as this attempt's state folder; its image."""
    image, state = home / "disk", home / "state"
    state.mkdir()
    with image.open("wb") as disk:
        disk.truncate(MIB[kind] << 20)
    _run(f"mkfs.{kind}", "-q", str(image))
    with _mounted(image, state):
        yield image


@contextmanager
def _after_the_cut(home: Path) -> Iterator[Path]:
    """The copied disk as the state folder of a machine that has started again."""
    state = home / "state"
    with _mounted(home / "cut", state):
        os.environ["QLORA_TUI_BOOT_ID"] = "after the cut"
        try:
            yield state
        finally:
            runs.kill_all()


@contextmanager
def _mounted(image: Path, at: Path) -> Iterator[None]:
    _run("mount", "-o", "loop", str(image), str(at))
    try:
        yield
    finally:
        # Children of a killed trainer may live a moment longer.
        until = time.monotonic() + 30
        while (
            subprocess.run(["umount", str(at)], capture_output=True).returncode and time.monotonic() < until
        ):
            time.sleep(0.2)


def _copy(image: Path, to: Path) -> None:
    _run("cp", "--sparse=always", str(image), str(to))


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
