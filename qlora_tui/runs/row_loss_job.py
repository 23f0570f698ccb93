"""Has the loss of each training row of a run measured, in a process of its own that loads the model."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable

import msgspec
from msgspec import Struct

from qlora_tui import subprocesses
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.row_losses import RowLosses, read_row_losses

WORKER = "qlora_tui.training.row_loss_worker"


class RowLossMessage(Struct, frozen=True, omit_defaults=True):
    """One line of the worker: progress, or the error that ended it."""

    done: int = 0
    total: int = 0
    title: str = ""
    what: str = ""
    why: str = ""
    fix: str = ""


_MESSAGES = msgspec.json.Decoder(RowLossMessage)


def measure_row_losses(
    run: RunDir, progress: Callable[[int, int], None] = lambda done, total: None
) -> RowLosses:
    """Measure all training rows of a run, which takes about as long as training on them once.

    Args:
        progress: called with the passes over samples done, and of all.

    Raises:
        UserError: the run has no adapter, or its data or model cannot be read.
    """
    failure: RowLossMessage | None = None
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            subprocesses.module_argv(WORKER, str(run.path)),
            env=subprocesses.subprocess_env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                message = _decoded(line)
                if message is not None and message.title:
                    failure = message
                elif message is not None:
                    progress(message.done, message.total)
            code = child.wait()
        finally:
            child.kill()
            child.communicate()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if failure is not None:
        raise UserError(failure.title, what=failure.what, why=failure.why, fix=failure.fix)
    losses = read_row_losses(run) if not code else None
    if losses is None:
        raise UserError(
            "The rows could not be measured",
            what=f"The process that measured the rows of {run.id} ended with code {code}.",
            why=lines[-1] if lines else "",
            fix="Close other programs if the machine is short of memory, and try again.",
        )
    return losses


def _decoded(line: bytes) -> RowLossMessage | None:
    """The message in a line of output; None for a line that a library printed."""
    try:
        return decode_json(line, _MESSAGES)
    except msgspec.MsgspecError:
        return None
