"""Both cores taken: by a real training of the demo's model where it is at hand, else by two empty loops."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.runs import actions
from qlora_tui.runs.status import ACTIVE, read_status

TRAINING = "real training on the CPU"
LOOPS = "two empty loops, no training"
_PATIENCE_S = 300.0


@contextlib.contextmanager
def training(model: Path) -> Iterator[None]:
    """The demo's model in training, from the first step on; ended on leaving."""
    run = actions.submit(build_recipe(preset="balanced", model=str(model), data=[str(CONVERSATIONS)]))
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while (status := read_status(run)).phase != "training":
            if time.monotonic() > deadline or status.state not in (*ACTIVE, "queued"):
                raise TimeoutError(f"no training within {_PATIENCE_S:.0f} s: {status.state} {status.detail}")
            time.sleep(0.5)
        yield
    finally:
        # Killed and not asked to stop: a checkpoint of it is of no use, and the folder goes with it.
        process = read_status(run).process
        if process is not None and process.is_alive():
            psutil.Process(process.pid).kill()
        deadline = time.monotonic() + _PATIENCE_S
        while read_status(run).state in (*ACTIVE, "lost") and time.monotonic() < deadline:
            time.sleep(0.1)  # until its runner has seen it too


@contextlib.contextmanager
def loops() -> Iterator[None]:
    """Two processes that never wait, and end with this one, however it ends."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
