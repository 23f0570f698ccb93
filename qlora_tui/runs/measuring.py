"""Measures something of a run that has ended, in a child process that loads the model.

The child holds the run's lock meanwhile: no trainer changes the adapter while it is measured, nothing else
measures it, and the run is not deleted.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable

from qlora_tui import subprocesses
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.worker_messages import read_messages


class MeasuringStoppedError(Exception):
    """A measurement was stopped by its :class:`StopSwitch`."""


class StopSwitch:
    """Ends a measurement from another thread."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._child: subprocess.Popen[bytes] | None = None

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        """Let :meth:`stop` end this process, at once where that was called before."""
        self._child = child
        if self.is_stopped:
            child.kill()

    def stop(self) -> None:
        """End the process of the measurement."""
        self.is_stopped = True
        if self._child is not None:
            self._child.kill()


def measure_in_child(
    module: str,
    run: RunDir,
    progress: Callable[[int, int], None],
    arguments: tuple[str, ...] = (),
    started: Callable[[subprocess.Popen[bytes]], object] = lambda child: None,
) -> None:
    """Run a worker's module on a run until it ends.

    Args:
        module: such as ``qlora_tui.training.row_loss_worker``.
        run: its folder is the worker's first argument.
        progress: called with what is done, and of how much.
        arguments: of the worker, after the folder.
        started: called with the child process; killing it ends the measurement with an error.

    Raises:
        UserError: the worker reported it, or ended without saying why.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            subprocesses.module_argv(module, str(run.path), *arguments),
            env=subprocesses.subprocess_env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert child.stdout is not None
        started(child)
        try:
            error = read_messages(child.stdout, progress)
            code = child.wait()
        finally:
            child.kill()
            child.communicate()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if error is not None:
        raise error
    if code:
        raise UserError(
            "The measurement failed",
            what=f"The process that measured {run.id} ended with code {code}.",
            why=lines[-1] if lines else "",
            fix="Close other programs if the machine is short of memory, and try again.",
        )
