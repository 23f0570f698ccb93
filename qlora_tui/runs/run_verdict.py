"""Whether a run worked, in one sentence: what it learned, what it forgot, and how its answers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from qlora_tui.formatting import format_float, pluralize
from qlora_tui.runs.task_metrics.answer_metrics import Metric
from qlora_tui.runs.task_metrics.intervals import Interval
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, TaskHeadline
from qlora_tui.runs.view import RunView

Outcome: TypeAlias = Literal["better", "worse", "unclear"]
_FORGETTING_WARNINGS = frozenset(("forgetting", "general_answers"))


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """What is known of a run's result."""

    loss: LossChange | None = None
    """Validation loss with its interval; None for runs of earlier versions and without validation data."""
    losses: tuple[float, float] | None = None
    """Validation loss before training and at its end, where both were measured, without an interval."""
    forgetting: float | None = None
    """Divergence from the base on general prompts, in nats; None where not measured."""
    forgot_much: bool = False
    """Whether the run was warned of that."""
    metric: Metric | None = None
    """The first metric of the answers; None where they were not measured."""


@dataclass(frozen=True)
class RunVerdict:
    """A sentence, and what it comes down to."""

    outcome: Outcome
    sentence: str
    has_answers: bool
    """Whether answers were measured."""


def gather_evidence(view: RunView, headline: TaskHeadline | None) -> RunEvidence:
    """What a run's events and the evaluation of its answers say.

    Args:
        view: the run.
        headline: its evaluation; None without one.
    """
    loss = None if headline is None else headline.loss
    if (change := view.validation_change) is not None:
        loss = LossChange(
            rows=change.rows,
            before=change.before,
            after=change.after,
            interval=Interval(change.low, change.high),
        )
    before, best = view.loss_before_training, view.evaluations[-1].loss if view.evaluations else None
    return RunEvidence(
        loss=loss,
        losses=None if before is None or best is None else (before, best),
        forgetting=view.forgetting,
        forgot_much=any(health.kind in _FORGETTING_WARNINGS for health in view.health),
        metric=headline.metrics[0] if headline is not None and headline.metrics else None,
    )


def judge_run(evidence: RunEvidence) -> RunVerdict:
    """The verdict. Answers count more than the loss; without either there is not enough evidence."""
    metric, loss = evidence.metric, evidence.loss
    outcome: Outcome = "unclear"
    if metric is not None and metric.comparison != "unclear":
        outcome = metric.comparison
    elif loss is not None and (loss.is_lower or loss.is_higher):
        outcome = "better" if loss.is_lower else "worse"
    parts = [_loss_words(evidence), _forgetting_words(evidence), _metric_words(metric)]
    return RunVerdict(outcome, f"{'; '.join(filter(None, parts))}.", metric is not None)


def _loss_words(evidence: RunEvidence) -> str:
    loss = evidence.loss
    if loss is None or not loss.rows:
        if evidence.losses is None:
            return "Not enough evidence that it learned: no validation data"
        before, after = evidence.losses
        return (
            f"Not enough evidence that it learned: validation loss {before:.2f} → {after:.2f}, "
            "rows not compared"
        )
    values = f"validation loss {loss.before:.2f} → {loss.after:.2f}"
    if loss.is_lower:
        return f"It learned: {values}"
    if loss.is_higher:
        return f"It got worse: {values}"
    return f"Not enough evidence that it learned: {values} on {pluralize(loss.rows, 'row')}"


def _forgetting_words(evidence: RunEvidence) -> str:
    if evidence.forgetting is None:
        return "forgot much" if evidence.forgot_much else ""
    much = "much" if evidence.forgot_much else "little"
    return f"forgot {much} ({format_float(evidence.forgetting, 2)} nats)"


def _metric_words(metric: Metric | None) -> str:
    if metric is None:
        return ""
    values = f"{metric.name} {metric.adapter:.0%}, base {metric.base:.0%}"
    if metric.comparison == "better":
        return f"answers better: {values}"
    if metric.comparison == "worse":
        return f"answers worse: {values}"
    return f"answers not clearly better: {values} on {pluralize(metric.rows, 'prompt')}"
