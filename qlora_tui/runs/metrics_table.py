"""The recorded steps of a run as a file: a table for spreadsheets and notebooks, or a picture.

The table is a CSV or Parquet file with a row for each recorded step. Columns of evaluations are empty at
steps without an evaluation. Shares of general answers are empty where these answers were not counted. Rewards
are empty unless the run uses a preference method. An evaluation at a step that was not recorded, such as step
0, has its own row.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection
from pathlib import Path

from qlora_tui.errors import UsageError, UserError
from qlora_tui.files import write_new
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Evaluated
from qlora_tui.runs.view import RunView

_OF_STEPS = ("epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "reward_margin")
_OF_EVALUATIONS = {
    "validation_loss": "loss",
    "forgetting": "forgetting",
    "validation_reward_accuracy": "reward_accuracy",
    "validation_reward_margin": "reward_margin",
}
"""Fields of an evaluation that the table shows, by the name of the column."""
_SHARES = {
    "answers_ended": ("ended", "answers"),
    "answers_looping": ("looping", "answers"),
    "answers_refused": ("refused", "answers"),
    "answers_valid_json": ("json_valid", "json_prompts"),
}
"""Counts of general answers, part and whole, by the name of the column that shows their ratio."""
_COLUMNS = (
    "step",
    *_OF_STEPS[:-1],
    *("validation_loss", "forgetting", *_SHARES, "validation_reward_accuracy", "validation_reward_margin"),
    "reward_margin",
)
_WHOLE = ("step", "tokens")
"""Columns with integers."""


def save_run(
    run: RunDir,
    file: Path,
    kinds: Collection[str],
    content: Callable[[RunView, str], bytes],
    *,
    neither: str,
    example: str,
) -> RunView:
    """Write what a run has recorded to a new file, and return the view that was read.

    Args:
        run: The run.
        file: Output file, whose suffix determines the kind.
        kinds: Possible suffixes, such as ``.svg``.
        content: Returns the content of a file, given its kind.
        neither: These suffixes as words of a message: ``in .svg nor in .png``.
        example: Example file names for a message.

    Raises:
        UserError: The kind is unknown, the run has no steps yet, or the file exists or cannot be written.
    """
    kind = file.suffix.lower()
    if kind not in kinds:
        raise UsageError(
            "Unknown kind of file",
            what=f"{file.name} ends neither {neither}.",
            fix=f"Use a file name such as {example}.",
        )
    view = RunView(run)
    view.refresh()
    if not len(view.series):
        raise UserError(
            "No steps yet",
            what=f"{run.name} has not recorded any steps.",
            fix="Try again after the run has trained a step.",
        )
    write_new(file, content(view, kind))
    return view


def metrics_csv(view: RunView) -> str:
    """Return the table as CSV. A value that was not a number is written as ``nan``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(["" if value is None else f"{value:.8g}" for value in row] for row in _rows(view))
    return text.getvalue()


def metrics_parquet(view: RunView) -> bytes:
    """Return the table as a Parquet file of int64 and double columns, with null for empty values."""
    import pyarrow
    import pyarrow.parquet

    columns = zip(*_rows(view), strict=True)
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


def _rows(view: RunView) -> list[list[float | None]]:
    by_step: dict[int, dict[str, float | None]] = {}
    for event in view.evaluations:
        if values := _evaluation(event):
            by_step[event.step] = values
    for place, step in enumerate(view.series.step):
        values = {name: getattr(view.series, name)[place] for name in _OF_STEPS}
        if math.isnan(view.series.reward_margin[place]):
            del values["reward_margin"]
        by_step[step] = values | by_step.get(step, {})
    return [[step, *map(values.get, _COLUMNS[1:])] for step, values in sorted(by_step.items())]


def _evaluation(event: Evaluated) -> dict[str, float | None]:
    """Return the columns that an evaluation has values for."""
    values = {name: getattr(event, field) for name, field in _OF_EVALUATIONS.items()}
    if (general := event.general_answers) is not None:
        for name, (part, whole) in _SHARES.items():
            if total := getattr(general, whole):
                values[name] = getattr(general, part) / total
    return {name: value for name, value in values.items() if value is not None}
