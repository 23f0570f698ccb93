"""Fits temperature and label bias to calibrate the probabilities of decisions, and judges the decisions.

No row is judged by a fit that has seen the row: rows are split into five folds, each fold is judged with a
fit to the other four, and the stored calibration is fitted to all rows. A temperature divides the log
probabilities of whole options (Guo et al. 2017, "On Calibration of Modern Neural Networks"). A bias for each
option is added only if the bias lowers the log loss of unseen rows by more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.data.decisions import Decision
from qlora_tui.runs.task_metrics.decisions import (
    MIN_FITTED_ROWS,
    Calibration,
    DecisionReport,
    FieldAccuracy,
    Measured,
    Quality,
    Threshold,
)
from qlora_tui.runs.task_metrics.intervals import Interval, mean_interval, share_interval

FOLDS = 5
TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99)
"""Shares of right decisions for which a confidence threshold is searched."""
_MIN_DECIDED = 10
"""Minimum number of rows at or above a threshold. A threshold with fewer rows is not reported."""
_ROUNDING = 1e-9
"""Maximum difference at which two confidences count as equal."""
_BINS = 15
"""Number of equally wide confidence bins of the calibration error, as in Guo et al. 2017."""
_LOG_RANGE = (math.log(0.05), math.log(50.0))
"""Range of the logarithm of the temperature."""
_SEARCHES = 60
_RIDGE = 1.0
"""Weight of the squared biases relative to the loss of one row."""
_RESAMPLES = 1000
_HONEST_DRAWS = 200


class _Fit(NamedTuple):
    """A fitted calibration: log probabilities are divided by the temperature, then the bias is added."""

    temperature: float
    bias: Tensor
    """Bias of each option, (options,)."""

    def logs(self, scores: Tensor) -> Tensor:
        """Return the log probabilities (rows, options) of options with scores (rows, options)."""
        return (scores / self.temperature + self.bias).log_softmax(-1)


_Fitter = Callable[[Tensor, Tensor], _Fit]


def calibrate(
    decision: Decision, base: Sequence[Sequence[float]], adapter: Sequence[Sequence[float]], truth: list[int]
) -> tuple[DecisionReport, list[int]]:
    """Fit a calibration of the adapter's scores, and judge both models' decisions.

    Args:
        decision: the decision with its options.
        base: log probabilities of the options for each row by the base, in nats.
        adapter: log probabilities by the adapter, in the same order.
        truth: the index of the right option of each row.

    Returns:
        The report, and the option that the adapter chooses for each row.
    """
    scores = torch.tensor(adapter, dtype=torch.float64)
    wanted = torch.tensor(truth)
    plain = scores.log_softmax(-1)
    fitter: _Fitter = _uncalibrated
    judged, fitted_rows = plain, 0
    if len(truth) >= MIN_FITTED_ROWS:
        fitted_rows = len(truth)
        judged = _cross_fitted(_fit_temperature, scores, wanted)
        biased = _cross_fitted(_fit_bias, scores, wanted)
        gain = _losses(biased, wanted) - _losses(judged, wanted)
        has_bias = mean_interval(gain.tolist()).high < 0
        judged = biased if has_bias else judged
        fitter = _fit_bias if has_bias else _fit_temperature
    fit = fitter(scores, wanted)
    before = torch.tensor(base, dtype=torch.float64).log_softmax(-1)
    chosen = judged.argmax(-1)
    confusion = torch.zeros(len(decision.options), len(decision.options), dtype=torch.int64)
    confusion.index_put_((wanted, chosen), torch.ones_like(wanted), accumulate=True)
    report = DecisionReport(
        options=decision.options,
        rows=len(truth),
        calibration=Calibration(
            temperature=fit.temperature,
            bias=tuple(fit.bias.tolist()) if bool(fit.bias.any()) else (),
            rows=fitted_rows,
        ),
        base=judge_probabilities(before, wanted),
        before=judge_probabilities(plain, wanted),
        after=judge_probabilities(judged, wanted),
        confusion=tuple(map(tuple, confusion.tolist())),
        thresholds=_thresholds(fitter, scores, wanted),
        fields=tuple(_field_accuracy(decision, field, chosen, wanted) for field in decision.fields),
    )
    return report, chosen.tolist()


def _cross_fitted(fitter: _Fitter, scores: Tensor, truth: Tensor) -> Tensor:
    """Return log probabilities (rows, options), computed for each row by a fit to the other folds."""
    logs = torch.empty_like(scores)
    for inside in _folds(len(truth)):
        logs[inside] = fitter(scores[~inside], truth[~inside]).logs(scores[inside])
    return logs


def _folds(rows: int) -> Iterator[Tensor]:
    """Yield a boolean mask (rows,) of each fold's rows."""
    for fold in range(FOLDS):
        yield torch.arange(rows) % FOLDS == fold


def _uncalibrated(scores: Tensor, truth: Tensor) -> _Fit:
    return _Fit(1.0, torch.zeros(scores.shape[1], dtype=scores.dtype))


def _fit_temperature(scores: Tensor, truth: Tensor) -> _Fit:
    """Return the temperature with the least log loss, by golden-section search: the loss has one minimum."""
    bias = torch.zeros(scores.shape[1], dtype=scores.dtype)
    loss = partial(_smooth_loss, truth=truth)
    low, high = _LOG_RANGE
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(_SEARCHES):
        first, second = high - golden * (high - low), low + golden * (high - low)
        if loss(_Fit(math.exp(first), bias).logs(scores)) <= loss(_Fit(math.exp(second), bias).logs(scores)):
            high = second
        else:
            low = first
    return _Fit(math.exp((low + high) / 2), bias)


def _fit_bias(scores: Tensor, truth: Tensor) -> _Fit:
    """Return the temperature and biases that minimize the log loss plus the weighted squared biases."""
    start = _fit_temperature(scores, truth)
    log_temperature = torch.tensor(math.log(start.temperature), dtype=scores.dtype, requires_grad=True)
    bias = torch.zeros(scores.shape[1], dtype=scores.dtype, requires_grad=True)
    search = torch.optim.LBFGS([log_temperature, bias], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        search.zero_grad()
        logs = (scores / log_temperature.exp() + bias).log_softmax(-1)
        loss = _smooth_loss(logs, truth) + _RIDGE * bias.square().sum() / len(truth)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss

    with torch.enable_grad():
        search.step(step)  # type: ignore[no-untyped-call]  # torch's own
    low, high = _LOG_RANGE
    temperature = math.exp(min(max(float(log_temperature.detach()), low), high))
    return _Fit(temperature, (bias - bias.mean()).detach())


def _smooth_loss(logs: Tensor, truth: Tensor) -> Tensor:
    """Return the mean log loss with smoothed labels: 1 / (rows + 2) of each label is spread over all options.

    This prevents a fit to a few rows that are all right from demanding certainty (Platt 1999, "Probabilistic
    Outputs for Support Vector Machines", section 2.2).
    """
    undecided = 1 / (len(truth) + 2)
    return functional.nll_loss(logs, truth) * (1 - undecided) - undecided * logs.mean()


def _losses(logs: Tensor, truth: Tensor) -> Tensor:
    return -logs[torch.arange(len(truth)), truth]


def judge_probabilities(logs: Tensor, truth: Tensor) -> Quality:
    """Judge log probabilities (rows, options) by the right options (rows,)."""
    options = logs.shape[1]
    confidence, chosen = logs.exp().max(-1)
    right = chosen == truth
    count = int(right.sum())
    losses = _losses(logs, truth)
    of_loss = mean_interval(losses.tolist())
    draw = torch.Generator().manual_seed(0)
    resamples = [torch.randint(len(truth), (len(truth),), generator=draw) for _ in range(_RESAMPLES)]

    def bootstrapped(measure: Callable[[Tensor], float]) -> Measured:
        values = sorted(measure(rows) for rows in resamples)
        edge = round(0.025 * _RESAMPLES)
        return Measured(measure(torch.arange(len(truth))), Interval(values[edge], values[-1 - edge]))

    honest = honest_errors(confidence)
    error = bootstrapped(lambda rows: calibration_error(confidence[rows], right[rows]))
    return Quality(
        accuracy=Measured(count / len(truth), share_interval(count, len(truth))),
        macro_f1=bootstrapped(lambda rows: _macro_f1(chosen[rows], truth[rows], options)),
        log_loss=Measured(
            float(losses.mean()),
            Interval(max(0.0, of_loss.low), of_loss.high) if math.isfinite(of_loss.low) else None,
        ),
        calibration_error=_error_interval(error, honest),
        honest_error=float(honest.mean()),
    )


def _macro_f1(chosen: Tensor, truth: Tensor, options: int) -> float:
    """Return the mean F1 of the options that are chosen or right in some row."""
    right = torch.bincount(truth[chosen == truth], minlength=options)
    both = torch.bincount(chosen, minlength=options) + torch.bincount(truth, minlength=options)
    occur = both > 0
    return float((2 * right[occur] / both[occur]).mean())


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return the expected calibration error.

    Rows are sorted into bins by confidence. The error is the distance between mean confidence and share of
    right rows in each bin, averaged over all rows.

    Args:
        confidence: probability of the chosen option (rows,).
        right: whether the chosen option is the right one (rows,).
    """
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, confidence.double() - right.double())
    return float(gaps.abs().sum() / len(right))


def honest_errors(confidence: Tensor) -> Tensor:
    """Simulate calibration errors of perfectly calibrated probabilities. Chance alone makes them exceed 0.

    In each draw, a row is right at random with a probability equal to its confidence (Bröcker and Smith 2007,
    "Increasing the Reliability of Reliability Diagrams").

    Args:
        confidence: probability of the chosen option (rows,).

    Returns:
        The errors, ascending (draws,).
    """
    draw = torch.Generator().manual_seed(0)
    chances = torch.rand(_HONEST_DRAWS, len(confidence), generator=draw)
    errors = [calibration_error(confidence, row < confidence) for row in chances]
    return torch.tensor(errors, dtype=torch.float64).sort().values


def _error_interval(measured: Measured, honest: Tensor) -> Measured:
    """Return a calibration error with an interval that corrects for the upward bias of the error.

    Chance only increases the measured error. In resampled rows it does so a second time, so the bootstrap
    interval is reflected about the measured error (Davison and Hinkley 1997, section 5.2). The interval
    extends to 0 if perfectly calibrated probabilities have an error at least as large as the measured one in
    more than 2.5 % of the draws.
    """
    value, interval = measured.value, measured.interval
    if interval is None:
        return measured
    is_honest = value <= float(honest[round(0.975 * len(honest)) - 1])
    low = 0.0 if is_honest else max(0.0, 2 * value - interval.high)
    return Measured(value, Interval(low, min(1.0, max(value, 2 * value - interval.low))))


def _thresholds(fitter: _Fitter, scores: Tensor, truth: Tensor) -> tuple[Threshold, ...]:
    """Return the thresholds for the targets, each with its number of decided rows and of right ones.

    A target is left out if no threshold reaches it, if too few rows are decided, or if the threshold of
    another target is at least as good. Each threshold is computed from all rows with the fit to all of them.
    The rows of each fold are decided by the fit and threshold of the other folds.
    """

    def surest(fit: _Fit, rows: Tensor) -> tuple[Tensor, Tensor]:
        confidence, chosen = fit.logs(scores[rows]).exp().max(-1)
        return confidence, chosen == truth[rows]

    whole = surest(fitter(scores, truth), torch.ones_like(truth, dtype=torch.bool))
    folds = []
    for inside in _folds(len(truth)):
        fit = fitter(scores[~inside], truth[~inside])
        folds.append((surest(fit, inside), surest(fit, ~inside)))
    found: list[Threshold] = []
    for target in TARGETS:
        threshold = _threshold(*whole, target)
        if threshold is None:
            continue
        count = of_these = 0
        for (confidence, right), others in folds:
            # If every row may be decided, the threshold 0 needs no fit.
            least = _threshold(*others, target) if threshold else 0.0
            if least is not None:
                decided = confidence >= least
                count += int(decided.sum())
                of_these += int((decided & right).sum())
        if count < _MIN_DECIDED:
            continue
        if found and (not threshold or (found[-1].rows, found[-1].right) == (count, of_these)):
            # A lower target has the same threshold.
            found.pop()
        if found and of_these * found[-1].rows <= found[-1].right * count:
            # Fewer rows, and not more often right.
            continue
        found.append(Threshold(target, threshold, count, of_these))
    return tuple(found)


def _threshold(confidence: Tensor, right: Tensor, target: float) -> float | None:
    """Return the lowest confidence from which at least a share ``target`` of the decisions is right.

    It is shortened to the fewest digits that still separate these rows from the others. 0 means that all rows
    are decided; None means that no confidence is high enough.
    """
    order = confidence.argsort(descending=True)
    counts = torch.arange(1, len(order) + 1)
    shares = right[order].double().cumsum(0) / counts
    # Rows whose confidences differ only by rounding are all decided or none.
    is_last = confidence[order].diff(append=torch.tensor([-1.0])) < -_ROUNDING
    enough = is_last & (shares >= target) & (counts >= min(_MIN_DECIDED, len(order)))
    if not bool(enough.any()):
        return None
    last = int(enough.nonzero()[-1])
    if last == len(order) - 1:
        return 0.0
    lowest, next_lower = map(float, confidence[order][last : last + 2])
    # Stay below 1, because another computation of the same probability may not reach 1.
    lowest = min(lowest, math.nextafter(1.0, 0.0))
    for digits in range(2, 16):
        short = math.floor(lowest * 10.0**digits) / 10.0**digits
        if next_lower < short <= lowest:
            return short
    return lowest


def _field_accuracy(decision: Decision, field: str, chosen: Tensor, truth: Tensor) -> FieldAccuracy:
    values = [decision.value(option, field) for option in range(len(decision.options))]
    count = sum(
        values[one] == values[other] for one, other in zip(chosen.tolist(), truth.tolist(), strict=True)
    )
    return FieldAccuracy(field, Measured(count / len(truth), share_interval(count, len(truth))))
