"""Measures what base and adapter answer to validation prompts, in a child process that loads the model."""

from __future__ import annotations

from collections.abc import Callable

from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import MeasuringStoppedError, StopSwitch, measure_in_child
from qlora_tui.runs.task_metrics.task_evaluation import (
    DEFAULT_PROMPTS,
    TaskEvaluation,
    read_task_evaluation,
)

WORKER = "qlora_tui.chat.task_worker"


def evaluate_task(
    run: RunDir,
    prompts: int = DEFAULT_PROMPTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    switch: StopSwitch | None = None,
) -> TaskEvaluation:
    """Let base and adapter answer validation prompts of a run. Answers of an earlier try are used again.

    Args:
        run: it has ended with an adapter.
        prompts: most prompts, spread evenly over the validation data.
        progress: called with the number of answers there are, and of all.
        switch: ends it; the answers so far stay.

    Raises:
        MeasuringStoppedError: the switch ended it.
        UserError: the run has no adapter, no validation data or no prompts, is in use, or cannot be read.
    """
    switch = switch or StopSwitch()
    try:
        measure_in_child(WORKER, run, progress, (str(prompts),), switch.attach)
    except UserError as error:
        if switch.is_stopped:
            raise MeasuringStoppedError from error
        raise
    evaluation = read_task_evaluation(run)
    if evaluation is None:
        raise UserError(
            "The answers could not be measured",
            what=f"{run.task_evaluation_path} cannot be read.",
            fix="Check the disk that holds it, and try again.",
        )
    return evaluation
