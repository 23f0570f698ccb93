"""A trainer killed by the kernel for memory is distinguished from one killed by a person."""

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
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs import retry
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import GPU_LOST, Failed, Health, PhaseChanged, Started
from qlora_tui.runs.outcomes import determine_outcome
from qlora_tui.runs.telemetry import Reading, encode
from tests.tui.workstation import config_of

GROUPS = Path("/sys/fs/cgroup/memory")
CHILD = """
import os, sys
from pathlib import Path
from qlora_tui.runs.retry import host_oom_kills
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
    monkeypatch.setattr(retry, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(retry, "_HIERARCHIES", tmp_path)
    monkeypatch.setattr(retry, "_VMSTAT", tmp_path / "vmstat")
    assert retry.host_oom_kills() == 0
    (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 7\n")
    (tmp_path / "cgroup").write_text("0::/user.slice/session-3.scope\n")
    assert retry.host_oom_kills() == 7
    group = tmp_path / "user.slice" / "session-3.scope"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert retry.host_oom_kills() == 2


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
        ("  what():  CUDA error: out of memory", -signal.SIGABRT, "Out of memory"),
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
        assert retry.last_phase(run) is None
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
    fix = retry.describe_fix(replace_setting(recipe, "quantization.double_quantization", double), "loading")
    assert named in fix and fix.count("quantization.") == (1 if named else 0)


def test_before_nothing_is_said_to_help_checkpointing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    files = SimpleNamespace(architecture=parse_architecture(config_of("HuggingFaceTB__SmolLM2-135M")))
    monkeypatch.setattr(retry, "resolve_model", lambda id_: files)
    monkeypatch.setattr(retry, "cheapest_changes", lambda *args, **kwargs: [])
    recipe = Recipe(model=Model(id="smollm2"))
    held = replace_setting(recipe, "training.gradient_checkpointing", "off")
    assert retry.suggest_settings(held).startswith("Gradient checkpointing saves ")
    lean = replace_setting(recipe, "training.gradient_checkpointing", "on")
    assert retry.suggest_settings(lean).startswith("No change of settings is enough")
