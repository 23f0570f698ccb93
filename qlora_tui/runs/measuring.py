"""Measuring a run that has ended, in a process that loads the model.

:func:`measure_in_child` starts the job, and the job works inside :func:`measuring`, which holds the run's
lock, so that no trainer changes the adapter, nothing else measures the run, and the run is not deleted.
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
    """Run a job on a run until the job ends, and return what it measured.

    Args:
        job: Import path of a function that takes the run's folder, such as ``package.module:function``.
        run: A run that has ended with an adapter.
        arguments: Further arguments of the function.
        read: Reads what the job wrote; returns None if that is impossible.
        progress: Called with the amount done and the total.
        should_stop: Called several times per second. If it returns true, the job is ended.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: The job raised it or ended early, or its result cannot be read.
    """
    run_job(
        job,
        run.path,
        *arguments,
        result=type(None),
        title="The measurement failed",
        subject=f"The process that measured {run.id}",
        on_progress=lambda message: progress(message.done, message.total),
        should_stop=should_stop,
    )
    measured = read(run)
    if measured is None:
        raise UserError(
            "The measurement cannot be read",
            what=f"The result that the measuring process wrote to {run.path} cannot be read.",
            fix="Check the disk that holds this folder, and try again.",
        )
    return measured


@contextmanager
def measuring(folder: Path) -> Iterator[RunDir]:
    """Yield the run in a folder while its lock is held, with torch set up and GPU errors converted.

    Raises:
        UserError: The run is being trained or measured, has no adapter, or the GPU failed.
    """
    # Only the job needs these imports; the app imports this module to start it.
    from qlora_tui.gpu.cuda_errors import cuda_problem
    from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env

    configure_torch_env({**allocator_variables(os.environ), "HF_HUB_OFFLINE": "1"})
    run = RunDir(folder.absolute())
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as lock:
        if lock is None:
            raise UserError(
                "The run is in use",
                what=f"{run.id} is being trained or measured.",
                fix="Wait until its trainer or the measurement has ended, and try again.",
            )
        if not (run.adapter_dir / WEIGHTS).is_file():
            raise UserError(
                "The run has no adapter",
                what=f"{run.id} has not ended yet, or ended without saving an adapter.",
                fix="If the run is still training, wait until it ends; otherwise resume it.",
            )
        try:
            yield run
        except RuntimeError as error:
            problem = cuda_problem(error)
            if problem is None:
                raise
            raise problem from error
