"""Sentences and tables about a sweep: its state, verdict and trials, and the effects of settings."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from msgspec import to_builtins

from qlora_tui.formatting import (
    capitalize,
    format_duration,
    format_float,
    format_loss,
    format_percent,
    format_progress,
    join_words,
    pluralize,
)
from qlora_tui.recipe.fields import get_setting, setting_name
from qlora_tui.runs.holds import time_words
from qlora_tui.sweeps.plan import Costs, Plan, plan_group, share_of
from qlora_tui.sweeps.sheet import Sheet
from qlora_tui.sweeps.space import Range, value_text
from qlora_tui.sweeps.view import Outcome, SweepView, Trial

_BINS = 3
_OUTCOMES: dict[Outcome, str] = {
    "waiting": "waiting",
    "training": "in training",
    "paused": "paused",
    "reached": "end of round",
    "dropped": "not kept",
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
}


def verdict_sentence(view: SweepView) -> str:
    """Return a sentence that says whether the best trial is better than the unchanged recipe, and why."""
    verdict = view.verdict
    name = f"trial {verdict.winner}"
    if verdict.basis == "no_result":
        if view.ended is None:
            return "No result yet."
        if verdict.winner is not None:
            return f"Unknown: {name} has the lowest loss, and the runs of the unchanged recipe were deleted."
        return "No winner: no trial has completed all of its steps."
    losses = f"{format_loss(verdict.found)} and {format_loss(verdict.base)}"
    if verdict.basis == "not_lower":
        if view.ended is None:
            return f"Not better so far: the losses of {name} and of the unchanged recipe are {losses}."
        return (
            f"Not better: the lowest loss of a trial ({name}) and the loss of the unchanged recipe are "
            f"{losses}."
        )
    difference = (verdict.base or 0.0) - (verdict.found or 0.0)
    compared = (
        f"the mean losses of {name} ({pluralize(verdict.found_runs, 'run')}) and of the unchanged recipe "
        f"({pluralize(verdict.base_runs, 'run')}) are {losses}, a difference of {format_float(difference)}"
    )
    if view.ended is None:
        return f"Not confirmed yet: {compared}."
    if verdict.basis == "noise_unknown":
        return f"Unknown: {compared}, and the noise between seeds was not measured (sweep.seeds)."
    noise = (
        f"the standard deviation between seeds is {format_float(verdict.noise)}, so a difference above "
        f"{format_float(verdict.margin)} arises by chance in one of twenty sweeps"
    )
    if verdict.basis == "one_run":
        selected = "This trial was selected for its loss and has no run with another seed"
        return f"Not confirmed: {compared}. {selected}; {noise}."
    return f"{'Better' if verdict.is_better else 'Not better'}: {compared}; {noise}."


@dataclass(frozen=True)
class Compared:
    """One side of the comparison behind a verdict."""

    name: str
    loss: float
    words: str
    """The runs that ``loss`` is the mean of: ``mean of seeds 43 and 44; selected with seed 42``."""


def compared(view: SweepView) -> tuple[Compared, ...]:
    """Return the best trial and the unchanged recipe, as the final verdict compares them; empty unless there
    is a final verdict that is based on several seeds.
    """
    verdict, winner = view.verdict, view.winner
    if verdict.basis != "confirmed" or winner is None or view.ended is None:
        return ()
    found, base = verdict.found or 0.0, verdict.base or 0.0
    selected = f"{_seeds(view.confirmations_of(winner))}; selected with seed {winner.seed}"
    return (
        Compared(f"trial {winner.number}", found, selected),
        Compared("unchanged", base, _seeds(view.base_trials)),
    )


def short_verdict(view: SweepView) -> tuple[str, str]:
    """Return a headline, and a sentence with the reason. If several seeds were compared (:func:`compared`),
    the headline says which settings to use, and the sentence is empty. Otherwise, both are derived from
    :func:`verdict_sentence`; if no losses can be compared, the sentence is empty.
    """
    verdict, winner = view.verdict, view.winner
    if winner is None or not compared(view):
        word, colon, why = verdict_sentence(view).partition(": ")
        if winner is None or verdict.found is None:
            return word + colon + why, ""
        losses = f"{format_loss(verdict.found)} instead of {format_loss(verdict.base)}"
        return f"{word}: trial {winner.number} ({', '.join(_values(winner))}) has {losses}", capitalize(why)
    fall = (verdict.base or 0.0) - (verdict.found or 0.0)
    size = f"{format_float(abs(fall))} (by chance ≤ {format_float(verdict.margin or 0.0)})"
    if verdict.is_better:
        return f"Use {', '.join(_values(winner))}: loss lower by {size}", ""
    effect = "raises" if fall < 0 else "lowers"
    return f"Keep the recipe unchanged: trial {winner.number} {effect} the loss by {size}", ""


def _values(trial: Trial) -> list[str]:
    return [f"{setting_name(path)} {value_text(value)}" for path, value in trial.values.items()]


def _seeds(runs: Sequence[Trial]) -> str:
    seeds = [str(run.seed) for run in runs if run.final is not None]
    return f"{'mean of seeds' if seeds[1:] else 'seed'} {join_words(seeds)}"


def state_sentence(view: SweepView) -> str:
    """Return a sentence about the sweep's state: ``Running: round 2 of 3, completed by 3 of 4 trials.``"""
    match view.state:
        case "waiting":
            held = next(t for t in view.trials if t.outcome == "paused")
            name = held.run.name if held.run else held.number
            return f"Waiting for {name}, which you paused: resume the sweep."
        case "pausing":
            return "Pausing: a run is saving its checkpoint."
        case "paused":
            return "Paused."
        case "running":
            return f"Running: {_progress(view)}{_until(view)}."
        case _:
            return {
                "done": "Finished.",
                "time": "Finished: the deadline has passed.",
                "stopped": "Stopped.",
                "base_failed": f"Failed: the unchanged recipe could not be trained{_base_failure(view)}.",
                "all_failed": "Failed: no trial has completed all of its steps.",
            }[view.ended.why if view.ended else "done"]


def _progress(view: SweepView) -> str:
    if not view.groups:
        return "training the unchanged recipe, to measure speed and noise"
    group = view.groups[-1]
    trials = view.of_group(group.number)
    in_round = [t for t in trials if t.outcome not in ("dropped",)]
    done = sum(trial.is_settled for trial in in_round)
    if any(trial.role == "confirmation" for trial in view.trials):
        return f"training the winner, trial {view.verdict.winner}, with other seeds"
    total = group.planned.trials if group.round == 1 else len(in_round)
    return (
        f"round {group.round} of {group.planned.rounds}, completed by {done} of {pluralize(total, 'trial')}"
    )


def _until(view: SweepView) -> str:
    left = view.seconds_left
    if view.deadline is None:
        return "" if left is None else f"; about {format_duration(left)} left"
    return f"; until {time_words(view.deadline)}"


def _base_failure(view: SweepView) -> str:
    failure = view.base_trials[0].failure if view.base_trials else ""
    return f" ({failure})" if failure else ""


def outcome_words(trial: Trial) -> str:
    """Return the outcome of a trial in words: ``in training``, ``not kept``, ``failed: Out of memory``."""
    words = _OUTCOMES[trial.outcome]
    return f"{words}: {trial.failure}" if trial.failure else words


def unequal_sentence(view: SweepView) -> str:
    """Return a warning that names the trials that trained on more or fewer tokens than the others; empty if
    there are none.
    """
    names = ", ".join(str(trial.number) for trial in view.unequal_tokens())
    warning = (
        "Unequal training: not all trials were compared after the same number of tokens "
        f"(exceptions: {names})."
    )
    return warning if names else ""


def tie_sentence(view: SweepView) -> str:
    """Return a sentence that names the trials whose loss looks the same as the winner's, and says why the
    winner was selected; empty if there are no such trials. Losses are compared as they are displayed.
    """
    winner = view.winner
    if winner is None or winner.final is None:
        return ""
    lowest, loss = winner.final.loss, format_loss(winner.final.loss)
    # Compared as they are shown, since a reader would look for a reason.
    equal = {
        str(trial.number): trial.final.loss
        for trial in view.trials
        if trial.role == "trial"
        and trial is not winner
        and trial.final is not None
        and format_loss(trial.final.loss) == loss
    }
    if not equal:
        return ""
    is_exact = set(equal.values()) == {lowest}
    why = "was created first" if is_exact else "has a lower loss in further decimals"
    names = join_words([str(winner.number), *equal])
    return f"With seed {winner.seed}, trials {names} tie at {loss}; trial {winner.number} {why}."


def is_repeat(view: SweepView, trial: Trial) -> bool:
    """Return whether a run repeats an earlier run with a different seed."""
    return trial.role == "confirmation" or trial in view.base_trials[1:]


def trial_name(view: SweepView, trial: Trial) -> str:
    """Return ``unchanged`` for the unchanged recipe, and the trial's number otherwise. A repeat of the run
    above it is marked: ``└ 14``.
    """
    if is_repeat(view, trial):
        return f"└ {trial.number}"
    return "unchanged" if trial.role == "base" else str(trial.number)


def value_of(view: SweepView, trial: Trial, path: str) -> Any:
    """Return a run's value of a setting that varies, as in TOML. A run of the unchanged recipe has the
    recipe's value.
    """
    return trial.values[path] if path in trial.values else to_builtins(get_setting(view.sheet.recipe, path))


def trial_value(view: SweepView, trial: Trial, path: str) -> str:
    """Return a run's value of a setting that varies; empty for a repeat of the run above it."""
    return "" if is_repeat(view, trial) else value_text(value_of(view, trial, path))


def trial_progress(trial: Trial) -> str:
    """Return ``20 of 1,081``, in steps; empty if the number of steps is unknown."""
    return format_progress(trial.step, trial.total_steps) if trial.total_steps else ""


def trial_words(view: SweepView, trial: Trial) -> str:
    """Return the outcome of a run in words; for the winner, ``winner``. The seed comes first for runs of the
    unchanged recipe, for repeats, and for a winner with repeats: ``seed 42, finished``.
    """
    is_winner = trial.number == view.verdict.winner
    words = "winner" if is_winner else outcome_words(trial)
    has_seed = trial.role != "trial" or (is_winner and view.mean_of(trial) is not None)
    return f"seed {trial.seed}, {words}" if has_seed else words


def trial_table(view: SweepView) -> tuple[list[str], list[list[str]]]:
    """Return the header of a table, and a row for each run in the order of :func:`ranked`."""
    paths, rounds = list(view.sheet.sweep.vary), range(1, view.rounds + 1)
    header = [
        "trial",
        *map(setting_name, paths),
        *(round_title(view, number) for number in rounds),
        "steps",
        "",
    ]
    rows = [
        [
            trial_name(view, trial),
            *(trial_value(view, trial, path) for path in paths),
            *(round_loss(view, number, trial) for number in rounds),
            trial_progress(trial),
            trial_words(view, trial),
        ]
        for trial in ranked(view)
    ]
    return header, rows


def round_title(view: SweepView, number: int) -> str:
    """Return the title of the column with the losses of a round, such as ``at 25%`` if the round ends after
    25% of the steps. The title is ``round 1`` if this share differs between groups of trials, and ``loss`` if
    the sweep has only one round.
    """
    if view.rounds == 1:
        return "loss"
    if len({group.planned.rounds for group in view.groups}) > 1:
        return f"round {number}"
    return f"at {format_percent(share_of(number, view.rounds))}"


def round_loss(view: SweepView, number: int, trial: Trial) -> str:
    """Return the validation loss of a run at the end of a round, counted from 1; empty if there is none.

    A run that is not a trial has a single loss, after its last step, which counts for the last round.
    """
    if trial.role != "trial":
        return format_loss(trial.final.loss) if number == view.rounds and trial.final is not None else ""
    return format_loss(trial.results[number].loss) if number in trial.results else ""


def ranked(view: SweepView) -> list[Trial]:
    """Return the winner, then the other runs by round and loss. The repeats of a run follow it."""

    def rank(trial: Trial) -> tuple[bool, int, float]:
        last = max(trial.results, default=0)
        loss = trial.results[last].loss if last else math.inf
        reached = view.rounds if trial.role != "trial" and trial.final is not None else last
        return trial is not view.winner, -reached, loss

    def repeats(trial: Trial) -> list[Trial]:
        if trial.role == "base":
            return view.base_trials[1:]
        return view.confirmations_of(trial)

    firsts = [trial for trial in view.trials if not is_repeat(view, trial)]
    rows = {run.number: run for trial in sorted(firsts, key=rank) for run in (trial, *repeats(trial))}
    return list(rows.values())


@dataclass(frozen=True)
class Bought:
    """Losses of the trials with one value of a setting, or with values in one part of its range."""

    path: str
    value: str
    trials: int
    mean: float
    """Mean validation loss at the end of the first round, the only round that all trials complete."""


def effects_title(view: SweepView) -> str:
    """Return the title of the table of :func:`what_settings_bought`. If the sweep has several rounds, the
    title says when the losses were measured: at the end of the first round.
    """
    return "effect of settings" + (f", {round_title(view, 1)}" if view.rounds > 1 else "")


def what_settings_bought(view: SweepView) -> list[Bought]:
    """Return the losses of the first round by setting and value. All were measured after the same number of
    tokens.
    """
    bought = []
    trials = [trial for trial in view.trials if trial.role == "trial" and 1 in trial.results]
    for path, values in view.sheet.sweep.vary.items():
        parts: dict[str, list[float]] = {}
        for trial in sorted(trials, key=lambda trial: _order(trial.values[path], values)):
            label = value_text(trial.values[path])
            if isinstance(values, Range):
                label = _part(values, trial.values[path])
            parts.setdefault(label, []).append(trial.results[1].loss)
        bought += [Bought(path, label, len(of), mean(of)) for label, of in parts.items()]
    return bought


def main_setting(bought: Sequence[Bought], shares: Mapping[str, float]) -> str:
    """Return the path of the setting that affects the loss most; empty if there are no losses.

    This is the setting with the largest share in ``shares``, the shares of the differences in loss that
    settings explain. Without ``shares``, it is the setting whose values differ most in their mean loss.
    """
    means: dict[str, list[float]] = {}
    for one in bought:
        means.setdefault(one.path, []).append(one.mean)
    return max(
        means, key=lambda path: (shares.get(path, 0.0), max(means[path]) - min(means[path])), default=""
    )


def _order(value: object, values: object) -> float:
    if isinstance(values, list):
        return values.index(value)
    return float(value)  # type: ignore[arg-type]  # of a range


def _part(values: Range, value: float) -> str:
    ends = [float(values.at(number / _BINS, whole=False)) for number in range(_BINS + 1)]
    index = max(0, min(_BINS - 1, sum(value >= end for end in ends) - 1))
    return f"{ends[index]:.2g} to {ends[index + 1]:.2g}"


def plan_ahead(sheet: Sheet, deadline: float | None, costs: Costs | None) -> Plan | str:
    """Return the trials and rounds that a sweep would have, or why they are unknown.

    Args:
        sheet: The sweep.
        deadline: Unix time at which the sweep must end; None if the number of trials is given.
        costs: Time that runs take; None if unknown.
    """
    trials, rounds, seeds = sheet.number_of_trials(), sheet.sweep.rounds, sheet.sweep.seeds
    if deadline is None:
        return Plan(trials, rounds or 1)
    if costs is None:
        return "The number of trials that fit is unknown until a run has been trained on this machine."
    plan = plan_group(
        costs,
        deadline - time.time() - costs.of_whole_runs(1),
        trials=trials,
        rounds=rounds,
        can_halve=sheet.is_safe_to_halve,
        confirmations=2 * (seeds - 1),
    )
    return plan or "The time is too short for a trial and its confirmation."


def plan_sentence(sheet: Sheet, trials: int, rounds: int, costs: Costs | None) -> str:
    """Describe what a sweep would train and how long that takes. ``costs`` is None if unknown."""
    seeds = sheet.sweep.seeds
    parts = [
        f"{pluralize(trials, 'trial')} in {pluralize(rounds, 'round')}",
        "the unchanged recipe once",
        *([f"then up to {2 * (seeds - 1)} whole runs to confirm the winner"] if seeds > 1 else []),
    ]
    text = "; ".join(parts)
    if costs is None:
        return f"{text}. How long they take is unknown until a run has been trained on this machine."
    seconds = costs.of_rounds(trials, rounds) + costs.of_whole_runs(1 + 2 * (seeds - 1))
    return f"{text}: about {format_duration(seconds)} at most."
