"""Real runs, recorded: SmolLM2-135M with NF4 on the demo's conversations, on two CPU cores.

One of 81 steps that finished; one in float16 with a learning rate of 1, whose loss became NaN; one limited to
1.06 GB of data (``prlimit --data``), which ran out of memory at every smaller micro-batch and with
checkpointing. Recorded by the project's own trainer. Only folders were renamed, and of the telemetry the last
300 lines remain, of the log the end.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from qlora_tui import paths
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Step, decode
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.status import Status, read_status, write_status

NAME = "smollm2-135m-demo-20261124-1609"
STEPS = 81
ENDED = 1_795_538_085.3
"""24 November 2026, 16:34:45 UTC."""
NOT_A_NUMBER, NO_MEMORY = "smollm2-135m-demo-20261125-2000", "smollm2-135m-demo-20261125-2010"


def recorded_run(name: str = NAME) -> RunDir:
    """Copy the run into the runs folder and return it."""
    run = RunDir(paths.runs_dir() / name)
    shutil.copytree(Path(__file__).parent / "recordings" / name, run.path)
    began = read_status(run).at - 1500
    os.utime(run.recipe_path, (began, began))
    return run


def recorded_until(step: int, *, process: ProcessIdentity) -> tuple[RunDir, float]:
    """Copy the run as it was after ``step`` (0: before the first); return it with the time of that step.

    ``process`` is its trainer; with a process that no longer exists the run is lost.
    """
    run = recorded_run()
    lines = run.events_path.read_bytes().splitlines(keepends=True)
    events = [decode(line) for line in lines]
    steps = [event for event in events if isinstance(event, Step)]
    count = events.index(steps[step - 1]) + 1 if step else events.index(steps[0])
    last = events[count - 1]
    assert last is not None
    run.events_path.write_bytes(b"".join(lines[:count]))
    samples = [
        line for line in run.telemetry_path.read_text().splitlines() if json.loads(line)["at"] <= last.at
    ]
    run.telemetry_path.write_text("".join(f"{line}\n" for line in samples))
    write_status(
        run,
        Status(
            state="running",
            at=last.at,
            process=process,
            phase="training",
            step=step,
            total_steps=steps[-1].step,
            loss=last.loss if isinstance(last, Step) else None,
        ),
    )
    return run, last.at
