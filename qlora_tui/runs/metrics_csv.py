"""The steps of a run as a CSV table, for spreadsheets and notebooks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from qlora_tui.runs.view import RunView

_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "validation_loss",
    "forgetting",
)


def metrics_csv(view: RunView) -> str:
    """Return a line for each recorded step.

    ``validation_loss`` and ``forgetting`` are empty at steps without an evaluation, and a value that was not
    a number is ``nan``. An evaluation before the first step has a separate line.
    """
    series = view.series
    validation = {e.step: e.loss for e in view.evaluations if e.loss is not None}
    forgetting = {e.step: e.forgetting for e in view.evaluations if e.forgetting is not None}
    steps = set(series.step)
    rows: list[tuple[int, list[str]]] = [
        (step, [str(step), *([""] * 6), _number(validation.get(step)), _number(forgetting.get(step))])
        for step in {**validation, **forgetting}
        if step not in steps
    ]
    columns: Sequence[Sequence[float]] = (
        series.epoch,
        series.loss,
        series.learning_rate,
        series.grad_norm,
        series.tokens,
        series.tokens_per_s,
    )
    for place, step in enumerate(series.step):
        values = [_number(column[place]) for column in columns]
        evaluated = (_number(validation.get(step)), _number(forgetting.get(step)))
        rows.append((step, [str(step), *values, *evaluated]))
    rows.sort(key=lambda row: row[0])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(row for _, row in rows)
    return text.getvalue()


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "nan" if math.isnan(value) else f"{value:.8g}"
