"""The runner with real processes. The trainer is played by a small script: what it does is up to the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.recipe.fields import with_value
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, queue
from qlora_tui.runs.directory import RunDir, create
from qlora_tui.runs.events import Failed, Finished, Started
from qlora_tui.runs.log import EventTail, last_event
from qlora_tui.runs.process import mark
from qlora_tui.runs.status import Status, read_status, write_status
from tests.waiting import wait_for

TRAINER = """
import os, signal, sys, time
from pathlib import Path
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed, Finished, Started
from qlora_tui.runs.log import EventWriter
from qlora_tui.runs.process import mark
from qlora_tui.runs.status import Status, write_status

run = RunDir(Path(sys.argv[1]))
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
micro_batch = int(words.get("--micro-batch", run.recipe().training.micro_batch))
accumulation = int(words.get("--gradient-accumulation", run.recipe().training.gradient_accumulation))
log = EventWriter(run.events_path)
log.append(Started(at=time.time(), attempt=1, pid=os.getpid(), micro_batch=micro_batch,
                   gradient_accumulation=accumulation))
write_status(run, Status(state="running", at=time.time(), process=mark()))
part = run.recipe().name
if part == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if part == "crashes":
    raise SystemExit("something unforeseen")
if part == "needs memory" and micro_batch > 1:
    log.append(Failed(at=time.time(), title="Out of GPU memory", what="no", kind="out_of_memory"))
    sys.exit(3)
while part == "waits" and not (run.path / "go").exists():
    time.sleep(0.02)
log.append(Finished(at=time.time(), step=3, seconds=1.0, tokens_per_s=1.0))
"""


@pytest.fixture(autouse=True)
def played_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m qlora_tui.training`` runs the script above, in every process a test starts."""
    (tmp_path / "played_trainer.py").write_text(TRAINER)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.orig_argv\n"
        "if 'qlora_tui.training' in sys.orig_argv:\n"
        "    import runpy\n"
        "    sys.argv = ['trainer', *sys.orig_argv[sys.orig_argv.index('qlora_tui.training') + 1:]]\n"
        "    import qlora_tui\n"
        "    runpy.run_path(__file__.replace('sitecustomize', 'played_trainer'), run_name='__main__')\n"
        "    raise SystemExit(0)\n"
    )
    here = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), here]))


def named(recipe: Recipe, name: str) -> Recipe:
    return with_value(recipe, "name", name)


def is_(run: RunDir, state: str) -> bool:
    return read_status(run).state == state


def test_queued_runs_are_taken_one_after_the_other(recipe: Recipe) -> None:
    first = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(first, "running"))
    second = actions.submit(named(recipe, "plain"))
    assert read_status(second).state == "queued"
    (first.path / "go").touch()
    wait_for(lambda: is_(second, "finished"))
    assert read_status(first).state == "finished"
    assert queue.waiting() == []


def test_a_trainer_killed_by_a_signal_is_told_as_killed(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "dies"))
    wait_for(lambda: is_(run, "failed"))
    ending = last_event(run.events_path)
    assert isinstance(ending, Failed)
    assert ending.kind == "killed"
    assert "SIGKILL" in ending.what
    assert f"resume {run.id}" in ending.fix


def test_a_trainer_that_ends_without_a_word_is_quoted_from_its_log(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "crashes"))
    wait_for(lambda: is_(run, "failed"))
    ending = last_event(run.events_path)
    assert isinstance(ending, Failed)
    assert ending.kind == "bug"
    assert "something unforeseen" in ending.what


def test_a_run_out_of_memory_is_tried_again_with_half_the_micro_batch(recipe: Recipe) -> None:
    run = actions.submit(with_value(named(recipe, "needs memory"), "training.micro_batch", 4))
    wait_for(lambda: is_(run, "finished"))
    used = [e.micro_batch for e in EventTail(run.events_path).drain() if isinstance(e, Started)]
    assert used == [4, 2, 1]


def test_a_second_runner_leaves_at_once(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(run, "running"))
    second = subprocess.run([sys.executable, "-m", "qlora_tui.runs.runner"], timeout=20, check=False)
    assert second.returncode == 0
    assert read_status(run).state == "running"
    (run.path / "go").touch()
    wait_for(lambda: is_(run, "finished"))


def test_the_trainer_outlives_a_killed_runner_and_the_next_runner_takes_over(recipe: Recipe) -> None:
    run = actions.submit(named(recipe, "waits"))
    wait_for(lambda: is_(run, "running"))
    runner = int((paths.state_dir() / "runner.lock").read_text())
    os.kill(runner, signal.SIGKILL)
    waiting = actions.submit(named(recipe, "plain"))
    assert read_status(run).state == "running"
    (run.path / "go").touch()
    wait_for(lambda: is_(waiting, "finished"))
    assert isinstance(last_event(run.events_path), Finished)
    assert read_status(run).state == "finished"


def test_a_run_cut_off_by_a_restart_is_told_so(recipe: Recipe) -> None:
    run = create(named(recipe, "plain"))
    before = mark()
    write_status(
        run,
        Status(
            state="running",
            at=time.time(),
            process=type(before)(pid=before.pid, started=before.started, boot_id="the boot before"),
        ),
    )
    assert "restarted" in read_status(run).detail
    subprocess.run([sys.executable, "-m", "qlora_tui.runs.runner"], timeout=20, check=True)
    ending = last_event(run.events_path)
    assert isinstance(ending, Failed)
    assert ending.kind == "lost"
    assert "restarted" in ending.title
    actions.resume(run)
    wait_for(lambda: is_(run, "finished"))


def test_a_queue_entry_whose_run_was_deleted_is_passed_over(recipe: Recipe) -> None:
    gone = create(named(recipe, "plain"))
    queue.enqueue(gone)
    for path in sorted(gone.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone.path.rmdir()
    run = actions.submit(named(recipe, "plain"))
    wait_for(lambda: is_(run, "finished"))
    assert queue.waiting() == []


def test_the_runner_does_not_import_torch() -> None:
    code = "import sys, qlora_tui.runs.runner; sys.exit('torch' in sys.modules or 'textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
