"""Real runs, recorded: SmolLM2-135M with NF4 on the demo's conversations, on two CPU cores.

Three that finished, of 81, 95 and 22 steps; one in float16 with a learning rate of 1, whose loss became NaN;
one limited to 1.06 GB of data (``prlimit --data``), which ran out of memory at every smaller micro-batch and
with checkpointing. Recorded by the project's own trainer. Only folders and runs were renamed, and of the
telemetry the last 300 lines remain, of the log the end. The weights are not recorded: a checkpoint is laid
out as empty files of their size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qlora_tui import paths
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Step, decode
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.runs.view import RunView

CONVERSATIONS = Path(__file__).parent / "recordings" / "conversations.jsonl"
"""The data of these runs: the demo's as they were then."""
NAME = "smollm2-135m-demo-20261124-1609"
STEPS = 81
LONGER, SHORTER = "smollm2-135m-demo-20261127-0233", "smollm2-135m-demo-20261127-0413"
"""Of 2.5 epochs, and of 22 steps."""
NOT_A_NUMBER, NO_MEMORY = "smollm2-135m-demo-20261125-2000", "smollm2-135m-demo-20261125-2010"

_ADAPTER_BYTES = {"adapter_model.safetensors": 19_593_064, "adapter_config.json": 1_212}
_CHECKPOINT_BYTES = {**_ADAPTER_BYTES, "optimizer.pt": 39_414_379, "rng_state.pth": 14_377, "complete": 191}
"""Files of the run of 95 steps, which trains as many parameters as each of the others."""


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


def lay_out_saved(run: RunDir) -> None:
    """Make the folders of the adapter and the checkpoints that the run had so far, of files without contents.

    The trainer keeps the newest checkpoints, and the best.
    """
    view = RunView(run)
    view.refresh()
    steps = [event.step for event in view.checkpoints]
    best = view.best.step if view.best is not None else None
    newest = steps[-run.recipe().training.keep_checkpoints :]
    for step in steps:
        if step in newest or step == best:
            _write_empty(run.checkpoints_dir / f"step-{step}", _CHECKPOINT_BYTES)
    if view.status.state in ("finished", "stopped"):
        _write_empty(run.adapter_dir, _ADAPTER_BYTES)


def _write_empty(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write files of these sizes that take no space."""
    folder.mkdir(parents=True)
    for name, bytes_ in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(bytes_)
