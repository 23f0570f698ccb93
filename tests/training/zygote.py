"""Trainers without their start: this process has imported everything, and forks one for each line it reads.

Each child is a real process that runs the trainer's own frame, to be stopped, watched and killed like any
other; it only lacks the ten seconds of imports. A line is JSON: ``run``, ``plan``, ``environment``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.retry import Plan
from qlora_tui.training import run as _stations  # noqa: F401
from qlora_tui.training.frame import run_trainer


def main() -> None:
    """Serve until standard input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_trainer(asked)
        print(child, flush=True)
        # Its end is reaped here, and told.
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become_trainer(asked: dict[str, object]) -> None:
    run = RunDir(Path(str(asked["run"])))
    environment = asked["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    with run.log_path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore")
    plan = asked["plan"]
    assert isinstance(plan, dict)
    code = 1
    try:
        code = run_trainer(run, Plan(**plan))
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
