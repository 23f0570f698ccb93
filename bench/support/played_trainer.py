"""A trainer that is a script: it trains nothing, and what it does follows from the name of the run."""

from __future__ import annotations

import os
from pathlib import Path

TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from qlora_tui.runs.control import take_requests
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.outcomes import record_outcome
from qlora_tui.runs.events import Failed, Finished, Paused, Started
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.memory_retry import RetryPlan, parse_plan
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


def install_played_trainer(folder: Path) -> str:
    """Return a PYTHONPATH with which ``python -m qlora_tui.training`` is the script above."""
    (folder / "played_trainer.py").write_text(TRAINER)
    (folder / "sitecustomize.py").write_text(
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
    return os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
