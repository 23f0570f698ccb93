"""Answers of a base and an adapter, and the evaluation of a run that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_tui.files import private_dir
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.answer_metrics import TaskRow, measure_answers
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, TaskEvaluation, write_task_evaluation


def a_row(reference: str, base: str, adapter: str, *, row: int = 1, prompt: str = "", **more: Any) -> TaskRow:
    """A prompt whose answers have both ended."""
    return TaskRow(
        source=0,
        row=row,
        prompt=prompt,
        reference=reference,
        base=base,
        adapter=adapter,
        base_ended=True,
        adapter_ended=True,
        **more,
    )


def put_evaluation(run: RunDir, rows: Sequence[TaskRow], loss: LossChange) -> TaskEvaluation:
    """Store an adapter of seven bytes in a run, and the evaluation of its answers."""
    (private_dir(run.adapter_dir) / "adapter_model.safetensors").write_bytes(b"weights")
    metrics = measure_answers(rows)
    evaluation = TaskEvaluation(
        run=run.id,
        adapter="7 bytes",
        max_new_tokens=32,
        validation_rows=len(rows),
        metrics=metrics,
        loss=loss,
        rows=tuple(rows),
    )
    write_task_evaluation(run, evaluation)
    return evaluation
