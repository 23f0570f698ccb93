"""Processes of ours that outlive who started them: the runner, a trainer, the news of an ending."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from qlora_tui import paths
from qlora_tui.gpu.visible import STABLE_ORDER


def ensure_runner() -> None:
    """Start a runner that outlives this process and its terminal; harmless where one is at work."""
    with (paths.state_dir() / "runner.log").open("ab") as log:
        start("qlora_tui.runs.runner", output=log)


def start(module: str, *arguments: str, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """A process of ours in a session of its own: a signal to this one's group does not reach it.

    Without ``output`` it writes where this process does.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        cwd="/",
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    search_path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | STABLE_ORDER | {"PYTHONPATH": os.pathsep.join(search_path), "PYTHONUNBUFFERED": "1"}
