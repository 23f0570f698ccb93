"""The steps of a run as a table, for spreadsheets and notebooks: CSV or Parquet."""

from __future__ import annotations

import csv
import io
import math

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
    "validation_reward_accuracy",
    "validation_reward_margin",
    "reward_margin",
)
_EVALUATION_COLUMNS = 8
"""Columns before the last that only an evaluation fills."""
_WHOLE = ("step", "tokens")
"""Columns of whole numbers."""


def metrics_csv(view: RunView) -> str:
    """Return the table of :func:`metrics_rows` as CSV; a value that was not a number is ``nan``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([_format_number(value) for value in row] for row in metrics_rows(view))
    return text.getvalue()


def metrics_parquet(view: RunView) -> bytes:
    """Return the table of :func:`metrics_rows` as a Parquet file: int64 and double, null where empty."""
    import pyarrow
    import pyarrow.parquet

    columns = zip(*metrics_rows(view), strict=True)
    arrays = {
        name: pyarrow.array(
            [None if value is None else int(value) for value in column] if name in _WHOLE else column,
            pyarrow.int64() if name in _WHOLE else pyarrow.float64(),
            from_pandas=False,
        )
        for name, column in zip(_COLUMNS, columns, strict=True)
    }
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def metrics_rows(view: RunView) -> list[list[float | None]]:
    """Return a row for each recorded step, in the order of ``_COLUMNS``.

    The columns from ``validation_loss`` on are empty at steps without an evaluation, those from
    ``answers_ended`` on wherever general answers were not counted: they are shares of them. Those of rewards
    are empty without a preference method; the last is that of the step. An evaluation before the first step
    has a separate row.
    """
    series = view.series
    evaluated = {event.step: _evaluation_columns(event) for event in view.evaluations}
    steps = set(series.step)
    rows: list[list[float | None]] = [
        [step, *([None] * 6), *columns, None]
        for step, columns in evaluated.items()
        if step not in steps and any(value is not None for value in columns)
    ]
    columns = (
        series.epoch,
        series.loss,
        series.learning_rate,
        series.grad_norm,
        series.tokens,
        series.tokens_per_s,
    )
    empty: list[float | None] = [None] * _EVALUATION_COLUMNS
    for place, step in enumerate(series.step):
        margin = series.reward_margin[place]
        values = [column[place] for column in columns]
        rows.append([step, *values, *evaluated.get(step, empty), None if math.isnan(margin) else margin])
    rows.sort(key=lambda row: row[0] or 0)
    return rows


def _evaluation_columns(event: Evaluated) -> list[float | None]:
    values = [event.loss, event.forgetting]
    rewards = [event.reward_accuracy, event.reward_margin]
    general = event.general_answers
    if general is None or not general.answers:
        return [*values, None, None, None, None, *rewards]
    values += [count / general.answers for count in (general.ended, general.looping, general.refused)]
    return [*values, general.json_valid / general.json_prompts if general.json_prompts else None, *rewards]


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return "nan" if math.isnan(value) else f"{value:.8g}"
