"""Processes of ours that outlive their parent: the runner, a trainer, a notification."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO

from qlora_tui import paths, subprocesses
from qlora_tui.gpu.visible_devices import PCI_BUS_ORDER_ENV, without_choice


def runner_lock_path() -> Path:
    """Path of the file that the runner holds a lock on."""
    return paths.state_dir() / "runner.lock"


def runner_log_path() -> Path:
    """Path of the runners' stdout and stderr."""
    return paths.state_dir() / "runner.log"


def ensure_runner() -> None:
    """Start a runner that outlives this process and its terminal; harmless if one is active."""
    with runner_log_path().open("ab") as log:
        spawn_detached("qlora_tui.runs.runner", output=log)


def spawn_detached(module: str, *arguments: str, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start a module in its own session, so that a signal to this process group does not reach it.

    Without ``output`` it writes to this process's output.
    """
    return subprocess.Popen(
        subprocesses.module_argv(module, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        cwd="/",
        env=detached_environ(),
    )


def detached_environ() -> dict[str, str]:
    """Environment of a process that outlives this one: without the GPU chosen for this one."""
    return without_choice(subprocesses.subprocess_env()) | PCI_BUS_ORDER_ENV
