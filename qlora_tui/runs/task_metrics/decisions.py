"""The quality of a run's decisions, and the file that programs need to make decisions with its adapter.

``decision.json`` in the adapter's folder holds the options and the calibration of their probabilities. Chat,
server and ``predict`` read it. The report is part of the run's evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.data.decisions import Decision
from qlora_tui.data.formats import RowFormat
from qlora_tui.decoding import read_json
from qlora_tui.files import atomic_write
from qlora_tui.formatting import align_columns, format_float, format_loss, format_percent, pluralize
from qlora_tui.recipe.schema import Thinking
from qlora_tui.runs.task_metrics.intervals import Interval, share_interval

FILE = "decision.json"
MOST_DECISIONS = 1000
"""Default number of validation rows to decide. More rows hardly change a calibration."""
MIN_FITTED_ROWS = 20
"""Number of rows below which no calibration is fitted and the temperature stays 1."""
_VERSION = 1
_MAX_BYTES = 1 << 24
_SHOWN_CONFUSIONS = 10
_WIDEST_MATRIX = 8
"""Maximum number of options for which the whole confusion matrix is shown. If there are more, or if the
options have fields, only the most frequent confusions are shown.
"""


class Calibration(Struct, frozen=True, kw_only=True):
    """Converts scores to probabilities: ``softmax(scores / temperature + bias)``."""

    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    """Bias of each option; empty if it does not lower the log loss on rows that it was not fitted to."""
    rows: int = 0
    """Number of validation rows for the fit; 0 if there were too few."""

    def probabilities(self, scores: Sequence[float]) -> list[float]:
        """Return the probability of each option, given its log probability in nats."""
        bias = self.bias or (0.0,) * len(scores)
        logits = [score / self.temperature + each for score, each in zip(scores, bias, strict=True)]
        highest = max(logits)
        weights = [math.exp(logit - highest) for logit in logits]
        total = sum(weights)
        return [weight / total for weight in weights]


class Decider(Struct, frozen=True, kw_only=True):
    """The content of ``decision.json``."""

    decision: Decision
    option_ids: tuple[tuple[int, ...], ...]
    """Token ids of each option, including the turn end."""
    calibration: Calibration
    layout: RowFormat
    """How rows of the training data are read. Rows to be decided are read in the same way."""
    thinking: Thinking = "auto"
    """Thinking setting that was used in training."""
    versions: dict[str, str] = {}
    """Versions of the libraries that were used for the fit."""
    version: int = _VERSION


_DECIDERS = msgspec.json.Decoder(Decider)


def write_decider(adapter: Path, decider: Decider) -> None:
    """Save a decider in an adapter's folder. Raises OSError."""
    atomic_write(adapter / FILE, msgspec.json.format(msgspec.json.encode(decider)))


def read_decider(adapter: Path) -> Decider | None:
    """Return the decider in an adapter's folder; None if it is missing, damaged, or of a later version."""
    decider = read_json(adapter / FILE, _DECIDERS, _MAX_BYTES)
    return decider if decider is not None and decider.version <= _VERSION else None


class Measured(Struct, frozen=True):
    """A value with its 95 % interval."""

    value: float
    interval: Interval | None
    """The interval; None for a mean of fewer than two rows."""


class Quality(Struct, frozen=True, kw_only=True):
    """Quality of one model's decisions."""

    accuracy: Measured
    macro_f1: Measured
    """Mean F1 over the options."""
    log_loss: Measured
    """Mean of the negative log probability of the right option, in nats."""
    calibration_error: Measured
    """Expected calibration error in 15 bins, 0 to 1."""
    honest_error: float | None = None
    """Mean calibration error that perfectly calibrated probabilities would show on these rows by chance.

    None in files of earlier versions.
    """


class Threshold(Struct, frozen=True):
    """A minimum confidence. Decisions at or above it need no review by a person."""

    target: float
    """Minimum share of right decisions that the threshold was chosen to reach."""
    confidence: float
    """Minimum confidence; 0 if every row may be decided."""
    rows: int
    """Number of rows decided, each with a threshold that was chosen on other rows."""
    right: int


class FieldAccuracy(Struct, frozen=True):
    """Accuracy of one field, if the options are JSON objects."""

    field: str
    accuracy: Measured


class DecisionReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Decisions of base and adapter on validation rows."""

    options: tuple[str, ...]
    rows: int
    calibration: Calibration
    base: Quality
    before: Quality
    """Quality of the adapter without calibration."""
    after: Quality
    """Quality of the adapter with calibration. Each row is evaluated with a calibration that was fitted to
    other rows.
    """
    confusion: tuple[tuple[int, ...], ...]
    """Numbers of rows, by right option and chosen option."""
    thresholds: tuple[Threshold, ...] = ()
    fields: tuple[FieldAccuracy, ...] = ()


def decision_lines(report: DecisionReport) -> Iterator[str]:
    """Yield the lines of the report on decisions."""
    calibration = report.calibration
    if calibration.rows:
        bias = " and a bias for each label" if calibration.bias else ""
        yield (
            f"Probabilities are calibrated with a temperature of {format_float(calibration.temperature)}"
            f"{bias}, fitted on {pluralize(calibration.rows, 'validation row')}."
        )
        yield (
            "Below, the calibration of each row was fitted on other rows (5 folds); 95% intervals are in "
            "parentheses."
        )
    else:
        yield (
            f"{pluralize(report.rows, 'validation row')} are too few to calibrate probabilities: "
            f"{MIN_FITTED_ROWS} rows are needed. Train with a larger data.validation_fraction."
        )
    columns = {"base": report.base, "adapter": report.before}
    if calibration.rows:
        columns["calibrated"] = report.after
    table = [
        ("", *columns),
        ("accuracy", *(_percent(each.accuracy) for each in columns.values())),
        ("macro F1", *(_percent(each.macro_f1) for each in columns.values())),
        ("log loss", *(_loss(each.log_loss) for each in columns.values())),
        ("calibration error", *(_percent(each.calibration_error) for each in columns.values())),
    ]
    honest = [each.honest_error for each in columns.values() if each.honest_error is not None]
    if honest:
        table.append(("  by chance", *(format_percent(each, 1) for each in honest)))
    for each in report.fields:
        table.append((f"{each.field} right", *[""] * (len(columns) - 1), _percent(each.accuracy)))
    yield ""
    yield from align_columns(table)
    if honest:
        yield (
            "By chance: the calibration error that perfectly calibrated probabilities would show on these "
            "rows."
        )
    yield ""
    if report.thresholds:
        yield from (threshold_sentence(threshold, report.rows) for threshold in report.thresholds)
        yield ""
    yield from _confusion_lines(report)


def threshold_sentence(threshold: Threshold, rows: int) -> str:
    """Return a sentence on the rows that the model may decide alone, such as ``Let the model decide above
    0.83: 71% of rows, 98.4% right (97% to 99%); leave the rest to a person.``
    """
    low, high = map(format_percent, share_interval(threshold.right, threshold.rows))
    share = format_percent(threshold.right / threshold.rows, 1)
    right = f"{format_percent(threshold.rows / rows)} of rows, {share} right ({low} to {high})"
    if not threshold.confidence:
        return f"If the model decides every row: {right}."
    # Show every digit, because 0.9962 is not 1.
    digits = max(2, len(repr(threshold.confidence)) - len("0."))
    return (
        f"Let the model decide above {threshold.confidence:.{digits}f}: {right}; leave the rest to a person."
    )


def _confusion_lines(report: DecisionReport) -> Iterator[str]:
    options = report.options
    if len(options) <= _WIDEST_MATRIX and not report.fields:
        header = ("right, then chosen", *options)
        counts = [(option, *map(str, row)) for option, row in zip(options, report.confusion, strict=True)]
        yield from align_columns([header, *counts])
        return
    wrong = sorted(
        (-count, right, chosen)
        for right, row in enumerate(report.confusion)
        for chosen, count in enumerate(row)
        if count and right != chosen
    )
    if wrong:
        shown = [
            (options[right], options[chosen], f"{-count:,}")
            for count, right, chosen in wrong[:_SHOWN_CONFUSIONS]
        ]
        yield from align_columns([("right", "chosen instead", "rows"), *shown])


def _percent(measured: Measured) -> str:
    return _with_interval(format_percent(measured.value, 1), measured.interval, format_percent)


def _loss(measured: Measured) -> str:
    return _with_interval(format_loss(measured.value), measured.interval, format_loss)


def _with_interval(value: str, interval: Interval | None, formatted: Callable[[float], str]) -> str:
    if interval is None:
        return value
    low, high = map(formatted, interval)
    return f"{value} ({low} to {high})"
