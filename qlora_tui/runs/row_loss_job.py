"""Measures the loss of each training row of a run, in a child process that loads the model."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable

from qlora_tui import subprocesses
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.row_losses import RowLosses, read_row_losses
from qlora_tui.worker_messages import read_messages

WORKER = "qlora_tui.training.row_loss_worker"


def measure_row_losses(
    run: RunDir,
    progress: Callable[[int, int], None] = lambda done, total: None,
    started: Callable[[subprocess.Popen[bytes]], object] = lambda child: None,
) -> RowLosses:
    """Measure all training rows of a run, which takes about as long as training on them once.

    Args:
        progress: called with the passes over samples done, and of all.
        started: called with the child process; killing it ends the measurement with an error.

    Raises:
        UserError: the run has no adapter, or its data or model cannot be read.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            subprocesses.module_argv(WORKER, str(run.path)),
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
    losses = read_row_losses(run) if not code else None
    if losses is None:
        raise UserError(
            "The rows could not be measured",
            what=f"The process that measured the rows of {run.id} ended with code {code}.",
            why=lines[-1] if lines else "",
            fix="Close other programs if the machine is short of memory, and try again.",
        )
    return losses
