"""Processes of ours that outlive who started them: the runner, a trainer, the news of an ending."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO

from qlora_tui import paths, subprocesses
from qlora_tui.gpu.visible_devices import PCI_BUS_ORDER_ENV


def runner_lock_path() -> Path:
    """The file that the one runner holds a lock on."""
    return paths.state_dir() / "runner.lock"


def runner_log_path() -> Path:
    """What runners wrote on stdout and stderr."""
    return paths.state_dir() / "runner.log"


def ensure_runner() -> None:
    """Start a runner that outlives this process and its terminal; harmless where one is at work."""
    with runner_log_path().open("ab") as log:
        spawn_detached("qlora_tui.runs.runner", output=log)


def spawn_detached(module: str, *arguments: str, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """A process of ours in a session of its own: a signal to this one's group does not reach it.

    Without ``output`` it writes where this process does.
    """
    return subprocess.Popen(
        subprocesses.module_argv(module, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        cwd="/",
        env=subprocesses.subprocess_env() | PCI_BUS_ORDER_ENV,
    )
