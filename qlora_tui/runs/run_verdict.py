"""Whether a run worked, in one sentence: what it learned, what it forgot, and how its answers are."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.formatting import format_float, pluralize
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.task_metrics.answer_metrics import Comparison, Metric
from qlora_tui.runs.task_metrics.intervals import MIN_ROWS, Interval, share_interval
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, TaskHeadline
from qlora_tui.runs.view import RunView

_FORGETTING_WARNINGS = frozenset(("forgetting", "general_answers"))


@dataclass(frozen=True)
class PreferenceAccuracy:
    """How often the better answer wins on the validation data of a preference run."""

    right: float
    """Share of the comparisons."""
    rows: int
    """Pairs, or rated answers."""
    unit: str
    """``pair`` or ``answer``."""
    expected: float
    """Share of a model that has not learned."""
    is_measured: bool = False
    """Whether ``expected`` was measured on the same data, and so is uncertain too."""

    @property
    def outcome(self) -> Comparison:
        """Whether more are right than without training, or fewer: their 95 % intervals do not touch."""
        now = self._interval(self.right)
        start = self._interval(self.expected) if self.is_measured else Interval(self.expected, self.expected)
        if self.rows < MIN_ROWS or (now.low <= start.high and now.high >= start.low):
            return "unclear"
        return "better" if now.low > start.high else "worse"

    def _interval(self, share: float) -> Interval:
        return share_interval(round(share * self.rows), self.rows)


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """What is known of a run's result."""

    preferences: PreferenceAccuracy | None = None
    """Stands for the loss in methods whose loss says nothing of how likely answers are."""
    loss: LossChange | None = None
    """Validation loss with its interval; None for runs of earlier versions and without validation data."""
    losses: tuple[float, float | None] | None = None
    """Validation loss before training and at its end, without an interval; None where not measured."""
    forgetting: float | None = None
    """Divergence from the base on general prompts, in nats; None where not measured."""
    forgot_much: bool = False
    """Whether the run was warned of that."""
    metric: Metric | None = None
    """The first metric of the answers; None where they were not measured."""


@dataclass(frozen=True)
class RunVerdict:
    """A sentence, and what it comes down to."""

    outcome: Comparison
    sentence: str
    has_answers: bool
    """Whether answers were measured."""


def gather_evidence(view: RunView, headline: TaskHeadline | None, recipe: Recipe | None) -> RunEvidence:
    """What a run's events and the evaluation of its answers say.

    Args:
        view: the run.
        headline: its evaluation; None without one.
        recipe: its recipe; None where that cannot be read.
    """
    preferences = None if recipe is None or recipe.learns_answers else _preference_accuracy(view, recipe)
    # An evaluation has the loss of answers, and compares with the base.
    counts = recipe is None or (recipe.learns_answers and not recipe.lora.init_from)
    loss = headline.loss if headline is not None and counts else None
    if (change := view.validation_change) is not None:
        loss = LossChange(
            rows=change.rows,
            before=change.before,
            after=change.after,
            interval=None if change.low is None or change.high is None else Interval(change.low, change.high),
        )
    before, last = view.loss_before_training, view.trained_evaluation
    return RunEvidence(
        preferences=preferences,
        loss=loss,
        losses=None if before is None else (before, None if last is None else last.loss),
        forgetting=None if last is None else last.forgetting,
        forgot_much=any(health.kind in _FORGETTING_WARNINGS for health in view.health),
        metric=headline.metrics[0] if headline is not None and headline.metrics else None,
    )


def _preference_accuracy(view: RunView, recipe: Recipe) -> PreferenceAccuracy | None:
    """How often the better answer wins at the last evaluation; None without what it is compared with."""
    last = view.trained_evaluation
    if last is None or view.data is None:
        return None
    first, rows = view.evaluations[0], view.data.validation_samples
    right = last.reward_accuracy
    start = None if first.step else first.reward_accuracy
    if right is None or not rows:
        return None
    if recipe.data.preferences == "dpo":
        # Before training all rewards are 0, and no pair is right.
        return PreferenceAccuracy(right, rows, "pair", 0.5)
    if start is None:
        return None
    if recipe.data.preferences == "kto":
        # Before training all rewards are 0, which is right for bad answers: calling all alike is no learning.
        return PreferenceAccuracy(right, rows, "answer", max(start, 1 - start))
    return PreferenceAccuracy(right, rows, "pair", start, is_measured=True)


def judge_run(evidence: RunEvidence) -> RunVerdict:
    """The verdict. Answers count more than the loss; without either there is not enough evidence."""
    metric, preferences, loss = evidence.metric, evidence.preferences, evidence.loss
    outcome: Comparison = "unclear"
    if metric is not None and metric.comparison != "unclear":
        outcome = metric.comparison
    elif preferences is not None:
        outcome = preferences.outcome
    elif loss is not None and (loss.is_lower or loss.is_higher):
        outcome = "better" if loss.is_lower else "worse"
    learned = _loss_words(evidence) if preferences is None else _preference_words(preferences)
    parts = [learned, _forgetting_words(evidence), _metric_words(metric)]
    return RunVerdict(outcome, f"{'; '.join(filter(None, parts))}.", metric is not None)


_LEARNED: dict[Comparison, str] = {
    "better": "It learned",
    "worse": "It got worse",
    "unclear": "Not enough evidence that it learned",
}


def _preference_words(preferences: PreferenceAccuracy) -> str:
    without = f"{preferences.expected:.0%} {'before' if preferences.is_measured else 'by chance'}"
    compared = pluralize(preferences.rows, f"validation {preferences.unit}")
    return f"{_LEARNED[preferences.outcome]}: {preferences.right:.0%} of {compared} right, {without}"


def _loss_words(evidence: RunEvidence) -> str:
    loss = evidence.loss
    if loss is None or not loss.rows:
        if evidence.losses is None:
            return f"{_LEARNED['unclear']}: no validation data"
        before, after = evidence.losses
        if after is None:
            return f"{_LEARNED['unclear']}: validation loss {before:.2f} before training, not measured since"
        return f"{_LEARNED['unclear']}: validation loss {before:.2f} → {after:.2f}, rows not compared"
    values = f"validation loss {loss.before:.2f} → {loss.after:.2f}"
    if loss.is_lower:
        return f"{_LEARNED['better']}: {values}"
    if loss.is_higher:
        return f"{_LEARNED['worse']}: {values}"
    return f"{_LEARNED['unclear']}: {values} on {pluralize(loss.rows, 'row')}"


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
