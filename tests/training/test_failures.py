"""Errors become events that say how to go on, and failed writes say what the disk said."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_tui.gpu import cuda_errors
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.damage import checkpoint_damage
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail, EventWriter
from qlora_tui.runs.events import Health, PhaseChanged
from qlora_tui.runs.telemetry import TelemetryTail
from qlora_tui.training import checkpoints
from qlora_tui.training.checkpoints import CheckpointState, save_with_torch
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.failures import disk_error, failure_event, true_disk_errors
from qlora_tui.training.reporter import Reporter, TelemetryRecorder
from tests.support.nvml_stub import install_nvml_stub
from tests.support.polling import wait_for
from tests.support.power import FaultyDisk
from tests.training.rank import Rank

pytestmark = pytest.mark.slow

ADAPTER = {"lora_A": torch.ones(64, 8)}
OPTIMIZER = {"state": {n: torch.full((64, 8), float(n)) for n in range(4)}}
STATE = CheckpointState(step=1, tokens=1, data_hash="d", padding_free=True, recipe="")
ALONE = DistributedContext(rank=0, world_size=1)


def save_checkpoint_files(folder: Path) -> None:
    """What a trainer saves, each with the library that writes it in a run."""
    with true_disk_errors():
        save_file(ADAPTER, folder / "adapter.safetensors")
        save_with_torch(OPTIMIZER, folder / "optimizer.pt")
        save_with_torch({"python": 1}, folder / "rng_state.pth")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_error_in_a_checkpoint_preserves_its_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(checkpoints, "BUFFER_BYTES", 512)
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


@pytest.mark.parametrize("failing", ["main draft", "main files", "other files", "main end"])
def test_a_checkpoint_that_one_process_cannot_write_is_none_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    run, full = RunDir(tmp_path), OSError(errno.ENOSPC, "No space left on device")
    barrier, values = threading.Barrier(2), [None, None]

    def fail(*_: object) -> None:
        raise full

    if failing == "main draft":
        run.checkpoints_dir.write_text("a file in place of the folder")
    elif failing == "main end":
        monkeypatch.setattr(checkpoints, "publish", fail)

    def write_in(rank: int) -> object:
        def save(folder: Path) -> None:
            if failing == ("other files" if rank else "main files"):
                fail()
            (folder / f"rng_state_{rank}.pth").write_text("1")

        try:
            return checkpoints.write(
                run, STATE, save, Rank(rank=rank, world_size=2, barrier=barrier, values=values)
            )
        except OSError as error:
            return error.errno

    with ThreadPoolExecutor(2) as pool:
        expected = errno.EEXIST if failing == "main draft" else errno.ENOSPC
        assert list(pool.map(write_in, (0, 1))) == [expected, expected]
    assert failing == "main draft" or run.checkpoints() == []


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


CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 56623104 bytes. Error code 12 (Cannot allocate memory)"
)
BUG = "Unexpected error in the trainer"
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB."


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (CPU, "The trainer requested 54 MiB, more than the machine had left."),
        ("could not create a primitive", "The machine is out of memory."),
        (OUT_OF_MEMORY, OUT_OF_MEMORY),
    ],
)
def test_out_of_memory_is_recognized_and_explained(tmp_path: Path, said: str, what: str) -> None:
    ending = failure_event(RuntimeError(said), RunDir(tmp_path), None, None)
    title = "Out of GPU memory" if "CUDA" in said else "Out of memory"
    assert (ending.kind, ending.title, ending.what) == ("out_of_memory", title, what)


ON_SHARED_GPU = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 410.00 "
    "MiB is free. Process 4242 has 5.10 GiB memory in use. Including non-PyTorch memory, this process has "
    "18.10 GiB memory in use. Of the allocated memory 17.20 GiB is allocated by PyTorch."
)


@pytest.mark.parametrize(
    ("said", "enough"),
    [
        (ON_SHARED_GPU, True),
        (ON_SHARED_GPU.replace("5.10 GiB", "210.00 MiB"), False),
        # In a container, torch lists the trainer's own process as another one.
        (ON_SHARED_GPU.partition(" Including")[0], False),
    ],
)
def test_another_program_that_held_what_was_missing_is_named(tmp_path: Path, said: str, enough: bool) -> None:
    failed = failure_event(RuntimeError(said), RunDir(tmp_path), None, None)
    assert failed.what == "The trainer requested 1.5 GiB, and 410 MiB of the GPU's 23.6 GiB was free."
    assert failed.missing_bytes == round(1.5 * 2**30) - 410 * 2**20
    assert failed.others_held_enough == enough
    assert (failed.why == "Another program held 5.1 GiB of the GPU's memory.") == enough
    assert failed.fix.startswith("Close the other program and resume. ") == enough


def test_out_of_memory_records_the_phase_of_the_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with EventWriter(run.events_path) as log:
        log.append(PhaseChanged(at=1.0, phase="loading"))
    ending = failure_event(RuntimeError(OUT_OF_MEMORY), run, Recipe(), None)
    assert ending.phase == "loading" and "smaller model" in ending.fix
    assert failure_event(RuntimeError("bug"), run, Recipe(), None).phase is None


class AcceleratorError(RuntimeError):
    """torch's, with CUDA's code."""

    error_code = 719


@pytest.mark.parametrize(
    ("error", "title"),
    [
        (AcceleratorError("in words of a later version"), "The GPU stopped computing"),
        (RuntimeError("CUDA error: unspecified launch failure\nCompile with…"), "The GPU stopped computing"),
        (RuntimeError("CUDA driver error: unknown error"), "The GPU stopped computing"),
        (
            RuntimeError("Triton Error [CUDA]: the launch timed out and was terminated"),
            "The GPU stopped computing",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            "No code for this GPU",
        ),
        (RuntimeError("CUDA error: invalid device function"), "No code for this GPU"),
        (RuntimeError("CUDA error: device kernel image is invalid"), "No code for this GPU"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "The GPU is busy"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "The GPU is busy"),
        (RuntimeError("CUDA driver error: device not ready"), "The GPU stopped computing"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            "A CUDA library could not start",
        ),
        (
            RuntimeError("Unexpected error from x. Error 802: system not yet initialized"),
            "The GPUs are not ready",
        ),
        (
            RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
            "The NVIDIA driver is incompatible",
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), BUG),
        (RuntimeError("CUDA error: device-side assert triggered"), BUG),
        (RuntimeError("unknown error"), BUG),
    ],
)
def test_what_cuda_reports_says_how_to_go_on(tmp_path: Path, error: RuntimeError, title: str) -> None:
    ending = failure_event(error, RunDir(tmp_path), None, None)
    assert (ending.title, ending.kind) == (title, "bug" if title == BUG else "problem")
    assert (f"resume {tmp_path.name}" in ending.fix) == (title != BUG)
    assert "{" not in ending.fix and ("pytorch.org" in ending.fix) == (title == "No code for this GPU")


def test_a_gpu_lost_in_a_suspend_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_errors, "_suspended_before_s", cuda_errors._suspended_s() - 60)
    assert "suspended" in failure_event(AcceleratorError(), RunDir(tmp_path), None, None).what


def test_a_gpu_that_the_driver_loses_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "lost_later", lost_after=12)
    run = RunDir(tmp_path)
    reporter = Reporter(run)
    recorder = TelemetryRecorder(run, reporter)
    recorder.start(gpus=1)
    wait_for(lambda: any(isinstance(event, Health) for event in EventTail(run.events_path).drain()))
    recorder.stop()
    ending = failure_event(RuntimeError("whatever follows"), run, None, None)
    assert (ending.title, ending.kind) == ("GPU lost", "problem")


def test_every_gpu_of_a_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    run = RunDir(tmp_path)
    recorder = TelemetryRecorder(run, Reporter(run))
    recorder.start(gpus=2)
    tail = TelemetryTail(run.telemetry_path)
    wait_for(lambda: any([gpu.index for gpu in reading.gpus] == [0, 1] for reading in tail.poll()))
    recorder.stop()


def test_what_onednn_cannot_do_is_no_lack_of_memory(tmp_path: Path) -> None:
    said = "could not create a primitive descriptor for the matmul primitive"
    assert failure_event(RuntimeError(said), RunDir(tmp_path), None, None).kind == "bug"
