"""What a run has recorded as a file: its steps as a table, for spreadsheets and notebooks, or a picture.

The table is CSV or Parquet. It has a row for each recorded step. Columns of evaluations are empty at steps
without one, shares of general answers wherever those were not counted, and rewards without a preference
method. An evaluation before the first step has a row of its own.
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
"""Columns, and their fields in an evaluation."""
_SHARES = {
    "answers_ended": ("ended", "answers"),
    "answers_looping": ("looping", "answers"),
    "answers_refused": ("refused", "answers"),
    "answers_valid_json": ("json_valid", "json_prompts"),
}
"""Columns, and the counts of general answers that they divide."""
_COLUMNS = (
    "step",
    *_OF_STEPS[:-1],
    *("validation_loss", "forgetting", *_SHARES, "validation_reward_accuracy", "validation_reward_margin"),
    "reward_margin",
)
_WHOLE = ("step", "tokens")
"""Columns of whole numbers."""


def save_run(
    run: RunDir,
    file: Path,
    kinds: Collection[str],
    content: Callable[[RunView, str], bytes],
    *,
    neither: str,
    example: str,
) -> RunView:
    """Write what a run has recorded to a file that does not exist yet, and return what that is.

    Args:
        run: The run.
        file: Where to write; the end of its name says what kind of file it is.
        kinds: Possible ends, such as ``.svg``.
        content: Returns the content of a file of a kind.
        neither: These ends in a message: ``in .svg nor in .png``.
        example: Names in a message, of which one is possible.

    Raises:
        UserError: Another kind of file, no steps yet, or the file exists or cannot be written.
    """
    kind = file.suffix.lower()
    if kind not in kinds:
        raise UsageError(
            "Unknown kind of file",
            what=f"{file.name} ends neither {neither}.",
            fix=f"Name a file such as {example}.",
        )
    view = RunView(run)
    view.refresh()
    if not len(view.series):
        raise UserError(
            "No steps yet",
            what=f"{run.name} has recorded no step.",
            fix="Try again after the run has trained a step.",
        )
    write_new(file, content(view, kind))
    return view


def metrics_csv(view: RunView) -> str:
    """Return the table as CSV; a value that was not a number is ``nan``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(["" if value is None else f"{value:.8g}" for value in row] for row in _rows(view))
    return text.getvalue()


def metrics_parquet(view: RunView) -> bytes:
    """Return the table as a Parquet file: int64 and double, null if empty."""
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
    """Return the columns of an evaluation that it has."""
    values = {name: getattr(event, field) for name, field in _OF_EVALUATIONS.items()}
    if (general := event.general_answers) is not None:
        for name, (part, whole) in _SHARES.items():
            if total := getattr(general, whole):
                values[name] = getattr(general, part) / total
    return {name: value for name, value in values.items() if value is not None}
