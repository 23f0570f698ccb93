"""How an attempt ended is read from its own events, whatever was appended after them.

A trainer killed by the kernel for memory is distinguished from one killed by a person.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.errors import EXIT_DISK
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs import memory_retry, run_queue
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventTail, EventWriter
from qlora_tui.runs.events import (
    GPU_LOST,
    AnyEvent,
    Failed,
    Health,
    Paused,
    PhaseChanged,
    Queued,
    Started,
    Stopped,
)
from qlora_tui.runs.outcomes import determine_outcome, record_outcome
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.telemetry import Reading, encode
from tests.tui.workstation import config_of

PAUSED = Paused(at=2.0, step=5)


def append(run: RunDir, *events: AnyEvent) -> None:
    with EventWriter(run.events_path) as log:
        for event in events:
            log.append(event)


def started(attempt: int) -> Started:
    return Started(at=1.0, attempt=attempt, pid=1)


def test_an_ending_counts_though_the_run_is_queued_again(run: RunDir) -> None:
    size = run.events_path.stat().st_size
    append(run, started(1), PAUSED, Queued(at=3.0))
    assert determine_outcome(run, 0, events_from=size) == PAUSED


def test_withdrawing_a_resumed_run_does_not_change_how_it_ended(run: RunDir) -> None:
    size = run.events_path.stat().st_size
    append(run, started(1), PAUSED, Queued(at=3.0), Stopped(at=4.0, step=5))
    assert determine_outcome(run, 0, events_from=size) == PAUSED


@pytest.mark.parametrize("is_child", [True, False])
def test_the_attempt_before_does_not_end_one_that_never_started(run: RunDir, is_child: bool) -> None:
    append(run, started(1), PAUSED, Queued(at=3.0))
    size = run.events_path.stat().st_size
    ending = determine_outcome(run, 1, events_from=size) if is_child else determine_outcome(run, None)
    assert isinstance(ending, Failed)


def test_a_run_queued_again_is_not_settled(run: RunDir) -> None:
    append(run, started(1), PAUSED, Queued(at=3.0))
    run_queue.enqueue(run)
    before = run.events_path.read_bytes()
    record_outcome(run, PAUSED)
    assert read_status(run).state == "queued"
    assert run.events_path.read_bytes() == before


def test_a_settled_status_is_not_written_a_second_time(run: RunDir) -> None:
    size = run.events_path.stat().st_size
    write_status(run, Status(state="paused", at=2.0, detail="By the trainer."))
    append(run, started(1), PAUSED, Queued(at=3.0))
    record_outcome(run, PAUSED, events_from=size)
    assert read_status(run).detail == "By the trainer."
    assert len([e for e in EventTail(run.events_path).drain() if isinstance(e, Paused)]) == 1


def test_a_signal_without_a_name_is_given_by_number(run: RunDir) -> None:
    ending = determine_outcome(run, -(signal.SIGRTMIN + 2))
    assert isinstance(ending, Failed)
    assert ending.kind == "killed"
    assert f"signal {signal.SIGRTMIN + 2}" in ending.what


def test_a_trainer_that_the_disk_failed_is_no_bug(run: RunDir) -> None:
    """The last event could not be written: the runner reads the exit code."""
    run.log_path.write_text("OSError: [Errno 5] Input/output error: '.adapter'\n")
    ending = determine_outcome(run, EXIT_DISK)
    assert isinstance(ending, Failed)
    assert (ending.title, ending.kind) == ("The disk failed", "problem")
    assert "Input/output error" in ending.what and "resume" in ending.fix


GROUPS = Path("/sys/fs/cgroup/memory")
CHILD = """
import os, sys
from pathlib import Path
from qlora_tui.runs.memory_retry import host_oom_kills
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = host_oom_kills()
child = os.fork()
if child == 0:
    if sys.argv[2] == "greedy":
        held = b"x" * (1 << 30)
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
print(host_oom_kills() - before)
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with 128 MiB to spend; needs root and cgroup v1."""
    group = GROUPS / f"qlora-tui-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(128 << 20))
    except OSError:
        pytest.skip("no control group may be made here")
    yield group
    group.rmdir()


@pytest.mark.parametrize(("who", "kills"), [("greedy", 1), ("killed by hand", 0)])
def test_the_kernels_killer_is_known_by_its_count(small_group: Path, who: str, kills: int) -> None:
    command = [sys.executable, "-c", CHILD, str(small_group), who]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(completed.stdout) == kills


def test_the_own_cgroups_count_precedes_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_retry, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory_retry, "_HIERARCHIES", tmp_path)
    monkeypatch.setattr(memory_retry, "_VMSTAT", tmp_path / "vmstat")
    assert memory_retry.host_oom_kills() == 0
    (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 7\n")
    (tmp_path / "cgroup").write_text("0::/user.slice/session-3.scope\n")
    assert memory_retry.host_oom_kills() == 7
    group = tmp_path / "user.slice" / "session-3.scope"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert memory_retry.host_oom_kills() == 2


def test_a_process_killed_for_memory_is_reported_with_its_size(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(Started(at=time.time(), attempt=1, pid=1, micro_batch_size=2, gradient_accumulation=4))
    run.telemetry_path.write_bytes(encode(Reading(at=time.time(), rss_bytes=13 << 30, cpu_percent=100.0)))
    by_kernel = determine_outcome(run, -signal.SIGKILL, host_out_of_memory=True)
    assert isinstance(by_kernel, Failed) and by_kernel.kind == "out_of_memory"
    assert "It last held 13.0 GiB." in by_kernel.why and "micro_batch_size" in by_kernel.fix
    by_hand = determine_outcome(run, -signal.SIGKILL)
    assert isinstance(by_hand, Failed) and by_hand.kind == "killed" and "resume" in by_hand.fix
    # Another process was the one chosen: a trainer ended by another signal was not.
    other = determine_outcome(run, -signal.SIGTERM, host_out_of_memory=True)
    assert isinstance(other, Failed) and other.kind == "killed"


NO_CODE, LOST = "No code for this GPU", "The GPU stopped computing"
SHORTAGE = "Error out of memory at line 88 in file /src/csrc/ops.cu"


def test_a_trainer_that_bitsandbytes_ended_is_out_of_memory(run: RunDir) -> None:
    run.log_path.write_text("11:22:33 training\n" + SHORTAGE + "\nnvrtc: unloaded\n")
    ending = determine_outcome(run, 1, log_from=0)
    assert isinstance(ending, Failed) and ending.kind == "out_of_memory" and ending.exit_code == 1
    assert SHORTAGE in ending.why and "micro_batch_size" in ending.fix


@pytest.mark.parametrize(
    ("line", "exit_code", "title"),
    [
        (
            "Error no kernel image is available for execution on the device at line 62 in file /s/ops.cu",
            1,
            NO_CODE,
        ),
        ("  what():  CUDA error: unspecified launch failure", -signal.SIGABRT, LOST),
        ("  what():  CUDA error: unspecified launch failure", -signal.SIGTERM, "The trainer was killed"),
        ("  what():  CUDA error: out of memory", -signal.SIGABRT, "Out of GPU memory"),
        ("Error invalid argument at line 62 in file /s/ops.cu", 1, "The trainer ended without a message"),
    ],
)
def test_a_library_that_ends_the_trainer_is_understood(
    run: RunDir, line: str, exit_code: int, title: str
) -> None:
    run.log_path.write_text(f"{line}\n")
    ending = determine_outcome(run, exit_code, log_from=0)
    assert isinstance(ending, Failed) and ending.title == title
    assert (ending.kind == "problem") == (title in (NO_CODE, LOST))
    assert (f"resume {run.id}" in ending.fix) == (title in (NO_CODE, LOST, "The trainer was killed"))


def test_a_gpu_that_the_driver_lost_ends_its_attempt(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(Health(at=1.0, kind=GPU_LOST, severity="error", evidence="Lost.", remedy="Reboot."))
        ending = determine_outcome(run, -signal.SIGKILL)
        assert isinstance(ending, Failed) and (ending.title, ending.kind) == ("GPU lost", "problem")
        assert f"resume {run.id}" in ending.fix
        log.append(Started(at=2.0, attempt=2, pid=1))
    killed = determine_outcome(run, -signal.SIGKILL)
    assert isinstance(killed, Failed) and killed.kind == "killed"


@pytest.mark.parametrize(
    ("earlier", "output"),
    [
        (SHORTAGE + "\n", "something unforeseen\n"),
        ("", f"11:22:33 the data says: {SHORTAGE}\n"),
        ("", SHORTAGE + "\n" + 70_000 * "x" + "\n"),
    ],
)
def test_other_output_with_these_words_is_no_lack_of_memory(run: RunDir, earlier: str, output: str) -> None:
    run.log_path.write_text(earlier + output)
    ending = determine_outcome(run, 1, log_from=len(earlier))
    assert isinstance(ending, Failed) and ending.kind == "bug"


def test_a_model_that_does_not_fit_is_named(recipe: Recipe) -> None:
    run = create_run(replace_setting(recipe, "quantization.method", "none"))
    with EventWriter(run.events_path) as log:
        log.append(PhaseChanged(at=1.0, phase="training"))
        log.append(Started(at=2.0, attempt=2, pid=1))
        assert memory_retry.last_phase(run) is None
        log.append(PhaseChanged(at=3.0, phase="tokenizing"))
        log.append(PhaseChanged(at=4.0, phase="loading"))
    ending = determine_outcome(run, -signal.SIGKILL, host_out_of_memory=True)
    assert isinstance(ending, Failed) and ending.phase == "loading"
    assert "smaller model" in ending.fix and "quantization.method) to nf4" in ending.fix


@pytest.mark.parametrize(
    ("method", "double", "named"),
    [("nf4", True, ""), ("nf4", False, "turn on double quantization"), ("int8", True, "method) to nf4")],
)
def test_only_settings_that_shrink_the_model_are_named(method: str, double: bool, named: str) -> None:
    recipe = replace_setting(Recipe(), "quantization.method", method)
    fix = memory_retry.describe_fix(
        replace_setting(recipe, "quantization.double_quantization", double), "loading"
    )
    assert named in fix and fix.count("quantization.") == (1 if named else 0)


def test_before_nothing_is_said_to_help_checkpointing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    files = SimpleNamespace(architecture=parse_architecture(config_of("HuggingFaceTB__SmolLM2-135M")))
    monkeypatch.setattr("qlora_tui.catalog.local_models.resolve_model", lambda id_: files)
    monkeypatch.setattr("qlora_tui.memory.cheapest_changes", lambda *args, **kwargs: [])
    recipe = Recipe(model=Model(id="smollm2"))
    held = replace_setting(recipe, "training.gradient_checkpointing", "off")
    assert memory_retry.suggest_settings(held).startswith("Gradient checkpointing saves ")
    lean = replace_setting(recipe, "training.gradient_checkpointing", "on")
    assert memory_retry.suggest_settings(lean).startswith("No change of settings is enough")
