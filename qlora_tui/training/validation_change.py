"""Validation loss before and after training, row by row: learned, or chance."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora_tui.data.store import GOOD
from qlora_tui.runs.events import ValidationCompared
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.training.forgetting.answer_logits import RowShape
from qlora_tui.training.initial_adapter_weights import load_initial_adapter
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.row_loss import token_losses

_MAX_ROWS = 128


def compare_validation(prepared: PreparedRun, model: Any) -> LossChange | None:
    """Report the loss of up to 128 validation rows before and after training; of pairs the chosen side.

    Before training the model is its base, or has the adapter that the run started from. Left out with several
    GPUs, and for methods that do not make answers likelier. An error, such as too little memory, costs the
    comparison and not the run, whose adapter is on the disk by now.

    Args:
        model: with the final adapter; it may have that of the start afterwards.

    Returns:
        What was reported; None where nothing was.
    """
    samples = prepared.data.validation.of_side(GOOD).spread(_MAX_ROWS)
    reporter = prepared.reporter
    if not len(samples) or prepared.dist.world_size > 1 or not prepared.recipe.learns_answers:
        return None
    shape = RowShape(
        packed=prepared.base.padding_free,
        max_length=prepared.recipe.data.max_length,
        multiple=prepared.device.row_multiple,
        pad_id=prepared.pad_id,
    )
    where = prepared.device.torch_device
    reporter.phase("evaluating", "validation rows, as before training and now")

    def losses(passes_done: int) -> list[tuple[float, ...]]:
        return token_losses(
            model,
            samples,
            shape,
            where,
            lambda done, total: reporter.progress("evaluating", passes_done * total + done, 2 * total),
        )

    try:
        after = losses(0)
        with _as_before_training(prepared, model):
            before = losses(1)
    except Exception as error:
        reporter.log(f"the validation rows were not compared: {type(error).__name__}: {error}")
        return None
    change = LossChange.of(
        [sum(row) for row in before], [sum(row) for row in after], [len(row) for row in after]
    )
    reporter.emit(
        ValidationCompared(
            at=time.time(),
            rows=change.rows,
            before=change.before,
            after=change.after,
            low=change.interval.low if change.interval else None,
            high=change.interval.high if change.interval else None,
        )
    )
    return change


@contextmanager
def _as_before_training(prepared: PreparedRun, model: Any) -> Iterator[None]:
    """Turn the adapter off inside, or give the model the one that the run started from, for good."""
    lora = prepared.recipe.lora
    if lora.init_from:
        load_initial_adapter(model, lora, prepared.files.architecture)
        yield
    else:
        with model.disable_adapter():
            yield
