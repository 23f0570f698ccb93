"""A run to play with: no model, no data, just a recipe and a directory; and a trainer that is a script."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs.directory import RunDir, create_run

TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from qlora_tui.runs.control import take_requests
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.events import Failed, Finished, Paused, Started
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.retry import RetryPlan, parse_plan
from qlora_tui.runs.status import Status, write_status

run = RunDir(Path(sys.argv[1]))
(run.path / "launch.json").write_text(json.dumps([os.getpid(), sys.orig_argv, dict(os.environ)]))
plan = parse_plan(sys.argv[3]) if "--plan" in sys.argv else RetryPlan()
training = plan.apply_to(run.recipe()).training
log = EventWriter(run.events_path)
settings = RetryPlan.from_settings(training).overrides()
log.append(Started(at=time.time(), attempt=1, pid=os.getpid(), **settings))
part = run.recipe().name
if part == "waits":
    os.mkfifo(run.path / "go")
write_status(run, Status(state="running", at=time.time(), process=process_identity()))
if part == "pauses" and not (run.path / "go").exists():
    os.mkfifo(run.path / "go")
    ending = Paused(at=time.time(), step=2)
    log.append(ending)
    record_outcome(run, ending)
    # Still exiting, as torch does for a second or two.
    (run.path / "go").read_text()
    sys.exit(0)
if part == "obeys":
    # Until it is paused or let go; a resumed one has a step more.
    step = 2 + len(list(run.path.glob("paused-*")))
    while not (run.path / "go").exists():
        for request in take_requests(run):
            ending = Paused(at=time.time(), step=step, hold=request.hold)
            (run.path / f"paused-{step}").touch()
            log.append(ending)
            record_outcome(run, ending)
            sys.exit(0)
        time.sleep(0.02)
if part == "says nothing":
    sys.exit(0)
if part == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if part == "crashes":
    raise SystemExit("something unforeseen")
if part == "bitsandbytes" and training.micro_batch_size > 1:
    print("Error out of memory at line 88 in file /src/csrc/ops.cu", file=sys.stderr, flush=True)
    os._exit(1)
if part == "needs memory" and training.micro_batch_size > 1:
    log.append(Failed(at=time.time(), title="Out of GPU memory", what="no", kind="out_of_memory"))
    sys.exit(3)
if part == "waits":
    (run.path / "go").read_text()
ending = Finished(at=time.time(), step=3, seconds=1.0, tokens_per_s=1.0)
log.append(ending)
record_outcome(run, ending)
"""


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
    """``python -m qlora_tui.training`` runs the script above, in every process a test starts."""
    (tmp_path / "played_trainer.py").write_text(TRAINER)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.orig_argv\n"
        "if 'qlora_tui.training' in sys.orig_argv:\n"
        "    import os, runpy\n"
        "    sys.argv = ['trainer', *sys.orig_argv[sys.orig_argv.index('qlora_tui.training') + 1:]]\n"
        "    import qlora_tui\n"
        "    try:\n"
        "        runpy.run_path(__file__.replace('sitecustomize', 'played_trainer'), run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        # Python reports any exit from this file as 1.\n"
        "        if isinstance(end.code, str):\n"
        "            print(end.code, file=sys.stderr, flush=True)\n"
        "        os._exit(end.code if isinstance(end.code, int) else 1)\n"
        "    os._exit(0)\n"
    )
    here = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), here]))
