"""The steps of a run as a CSV table, for spreadsheets and notebooks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from qlora_tui.runs.events import Evaluated
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
    "answers_ended",
    "answers_looping",
    "answers_refused",
    "answers_valid_json",
)

_EVALUATION_COLUMNS = 6
"""Columns, from the end, that only an evaluation fills."""


def metrics_csv(view: RunView) -> str:
    """Return a line for each recorded step.

    The columns from ``validation_loss`` on are empty at steps without an evaluation, those from
    ``answers_ended`` on wherever general answers were not counted: they are shares of them. A value that was
    not a number is ``nan``. An evaluation before the first step has a separate line.
    """
    series = view.series
    evaluated = {e.step: _evaluation_columns(e) for e in view.evaluations}
    steps = set(series.step)
    rows: list[tuple[int, list[str]]] = [
        (step, [str(step), *([""] * 6), *columns])
        for step, columns in evaluated.items()
        if step not in steps and any(columns)
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
        rows.append((step, [str(step), *values, *evaluated.get(step, [""] * _EVALUATION_COLUMNS)]))
    rows.sort(key=lambda row: row[0])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(row for _, row in rows)
    return text.getvalue()


def _evaluation_columns(event: Evaluated) -> list[str]:
    values = [_number(event.loss), _number(event.forgetting)]
    general = event.general_answers
    if general is None or not general.answers:
        return values + [""] * (_EVALUATION_COLUMNS - len(values))
    counts = (general.ended, general.looping, general.refused)
    values += [_number(count / general.answers) for count in counts]
    return [*values, _number(general.json_valid / general.json_prompts) if general.json_prompts else ""]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "nan" if math.isnan(value) else f"{value:.8g}"
