"""A real run, recorded: SmolLM2-135M with NF4 on the demo's conversations, 81 steps on two CPU cores.

Made by the project's own trainer; only the folders of model and data were renamed, and of the telemetry the
last 300 seconds are kept.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qlora_tui import paths
from qlora_tui.runs.directory import RunDir

NAME = "smollm2-135m-demo-20261124-1609"
ENDED = 1_795_538_085.3
"""24 November 2026, 16:34:45 UTC."""


def recorded_run() -> RunDir:
    """The run, copied to where runs are kept."""
    run = RunDir(paths.runs_dir() / NAME)
    shutil.copytree(Path(__file__).parent / "recordings" / NAME, run.path)
    os.utime(run.recipe_path, (ENDED - 1500, ENDED - 1500))
    return run
