"""Measuring a run that has ended, in a process that loads the model.

:func:`measure_in_child` starts the job, and :func:`measuring` is what the job does around its work: it holds
the run's lock meanwhile, so no trainer changes the adapter, nothing else measures the run, and it is not
deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from qlora_tui.errors import UserError
from qlora_tui.locks import PATIENCE_S, locked
from qlora_tui.runs.damage import WEIGHTS
from qlora_tui.runs.directory import RunDir
from qlora_tui.worker import run_job

T = TypeVar("T")


def measure_in_child(
    job: str,
    run: RunDir,
    *arguments: object,
    read: Callable[[RunDir], T | None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> T:
    """Run a job on a run until it ends, and return what it measured.

    Args:
        job: function of the run's folder.
        run: it has ended with an adapter.
        arguments: of the function, after the folder.
        read: reads what the job wrote; None if that is not possible.
        progress: called with what is done, and of how much.
        should_stop: ends it within a second.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: the job reported it, or ended without saying why.
    """
    run_job(
        job,
        run.path,
        *arguments,
        result=type(None),
        title="The measurement failed",
        subject=f"The process that measured {run.id}",
        fix="Close other programs if the machine is short of memory, and try again.",
        on_progress=lambda message: progress(message.done, message.total),
        should_stop=should_stop,
    )
    measured = read(run)
    if measured is None:
        raise UserError(
            "The measurement is lost",
            what=f"What the process wrote to {run.path} cannot be read.",
            fix="Check the disk that holds it, and try again.",
        )
    return measured


@contextmanager
def measuring(folder: Path) -> Iterator[RunDir]:
    """Provide the run in a folder while its lock is held, with torch set up and errors of the GPU in words.

    Raises:
        UserError: it is being trained or measured, has no adapter, or the GPU failed.
    """
    # Only the job needs them: the app imports this module to start it.
    from qlora_tui.gpu.cuda_errors import cuda_problem
    from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env

    configure_torch_env({**allocator_variables(os.environ), "HF_HUB_OFFLINE": "1"})
    run = RunDir(folder.absolute())
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as lock:
        if lock is None:
            raise UserError(
                "The run is in use",
                what=f"{run.id} is being trained or measured.",
                fix="Wait until that has ended, and try again.",
            )
        if not (run.adapter_dir / WEIGHTS).is_file():
            raise UserError(
                "The run has no adapter",
                what=f"{run.id} has not ended yet, or ended without one.",
                fix="Wait for its end, or resume it.",
            )
        try:
            yield run
        except RuntimeError as error:
            problem = cuda_problem(error)
            if problem is None:
                raise
            raise problem from error
