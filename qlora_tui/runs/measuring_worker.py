"""The worker's side of :mod:`.measuring`: what a process does around the measurement of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_tui.errors import UserError
from qlora_tui.gpu.cuda_errors import cuda_problem
from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env
from qlora_tui.locks import PATIENCE_S, locked
from qlora_tui.runs.directory import RunDir
from qlora_tui.subprocesses import end_with_parent
from qlora_tui.worker_messages import send_error


def run_measurement(folder: Path, measure: Callable[[RunDir], None]) -> int:
    """Measure the run in ``folder`` with its lock held, and report the error that ends it.

    Returns:
        The exit code.
    """
    # Without its parent it would only hold memory.
    end_with_parent()
    configure_torch_env({**allocator_variables(os.environ), "HF_HUB_OFFLINE": "1"})
    run = RunDir(folder.absolute())
    try:
        with measuring(run):
            measure(run)
    except UserError as problem:
        send_error(problem)
        return problem.exit_code
    except RuntimeError as error:
        problem_of_gpu = cuda_problem(error)
        if problem_of_gpu is None:
            raise
        send_error(problem_of_gpu)
        return problem_of_gpu.exit_code
    return 0


@contextmanager
def measuring(run: RunDir) -> Iterator[None]:
    """Hold a run's lock while it is measured.

    Raises:
        UserError: it is being trained or measured.
    """
    with locked(run.trainer_lock_path, patience_s=PATIENCE_S) as lock:
        if lock is None:
            raise UserError(
                "The run is in use",
                what=f"{run.id} is being trained or measured.",
                fix="Wait until that has ended, and try again.",
            )
        yield


def no_adapter(run: RunDir) -> UserError:
    """Build the error for a run without an adapter to measure."""
    return UserError(
        "The run has no adapter",
        what=f"{run.id} has not ended yet, or ended without one.",
        fix="Wait for its end, or resume it.",
    )
