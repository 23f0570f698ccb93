"""A checkpoint that cannot be written says what the disk said, whichever library was writing."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_tui.runs.damage import checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.training import checkpoints, disk_errors
from qlora_tui.training.checkpoints import CheckpointState
from qlora_tui.training.disk_errors import disk_error, true_disk_errors
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.failure import failure_event
from tests.support.power import FaultyDisk

pytestmark = pytest.mark.slow

ADAPTER = {"lora_A": torch.ones(64, 8)}
OPTIMIZER = {"state": {n: torch.full((64, 8), float(n)) for n in range(4)}}
STATE = CheckpointState(step=1, tokens=1, data_hash="d", padding_free=True, recipe="")
ALONE = DistributedContext(rank=0, world_size=1)


def save_checkpoint_files(folder: Path) -> None:
    """What a trainer saves, each with the library that writes it in a run."""
    with true_disk_errors():
        save_file(ADAPTER, folder / "adapter.safetensors")
        torch.save(OPTIMIZER, folder / "optimizer.pt")
        torch.save({"python": 1}, str(folder / "rng_state.pth"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_error_in_a_checkpoint_preserves_its_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(disk_errors, "BUFFER_BYTES", 512)
    run = RunDir(tmp_path)
    run.checkpoints_dir.mkdir()
    for at in count(1):
        with monkeypatch.context() as faulty:
            disk = FaultyDisk(faulty, at, code)
            try:
                checkpoints.write(run, STATE, save_checkpoint_files, ALONE)
            except OSError as error:
                assert error.errno == code, f"write {at}: {error!r}"
                assert all(checkpoint_damage(folder) is None for folder in run.checkpoints_dir.iterdir())
        if not disk.has_failed:
            break
    assert at > 20
    ((step, folder),) = run.checkpoints()
    assert torch.equal(torch.load(folder / "optimizer.pt")["state"][3], OPTIMIZER["state"][3])
    assert step == 1


@pytest.fixture
def no_signal() -> Iterator[None]:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("no_signal")
def test_every_library_reports_a_file_size_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 2000, 3000, 5000, 8000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError) as caught:
                save_checkpoint_files(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG, limit


def test_an_error_unrelated_to_the_disk_stays_unchanged(tmp_path: Path) -> None:
    with pytest.raises(AttributeError), true_disk_errors():
        torch.save(lambda: None, tmp_path / "x")
    assert disk_error(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize(
    ("code", "title"),
    [
        (errno.ENOSPC, "No space left on the disk"),
        (errno.EDQUOT, "The disk quota is used up"),
        (errno.EIO, "The disk reported an error"),
        (errno.EROFS, "The file system is read-only"),
    ],
)
def test_a_run_that_the_disk_ended_says_so(tmp_path: Path, code: int, title: str) -> None:
    run = RunDir(tmp_path)
    in_rust = RuntimeError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    for error in (OSError(code, os.strerror(code), "x.pt"), in_rust):
        ending = failure_event(error, run, None, None)
        assert (ending.title, ending.kind) == (title, "problem")
        assert f"resume {run.id}" in ending.fix
