"""Measures the loss of each training row of a run, in a child process that loads the model."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measure_in_child
from qlora_tui.runs.row_losses import RowLosses, read_row_losses

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
        UserError: the run has no adapter, is in use, or its data or model cannot be read.
    """
    measure_in_child(WORKER, run, progress, started=started)
    losses = read_row_losses(run)
    if losses is None:
        raise UserError(
            "The rows could not be measured",
            what=f"{run.row_losses_path} cannot be read.",
            fix="Check the disk that holds it, and try again.",
        )
    return losses
