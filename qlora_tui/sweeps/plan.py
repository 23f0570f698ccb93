"""Plans and judges sweeps: how many trials fit in the available time, which of them continue, and whether the
winner's lead exceeds the noise.

Computes with numbers only, and reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal, TypeAlias

from qlora_tui.sweeps.sheet import AUTO_ROUNDS, HALVING

_T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""One-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom. The last value is also used for
more degrees of freedom.
"""
_CAUTION = 1.1
"""Safety factor on predicted times, because trials with more parameters are slower than the base."""
_MOST_TRIALS = 64
"""Maximum number of trials in a group of a sweep with a deadline. If more fit, later groups can use the
results of earlier ones.
"""


def share_of(round_: int, rounds: int) -> float:
    """Return the share of a run's steps (0 to 1) that is completed by the end of a round, counted from 1."""
    return float(HALVING ** (round_ - rounds))


def kept_of(trials: int) -> int:
    """Return how many trials of a round continue: the better half, but at least 1."""
    return max(1, trials // HALVING)


@dataclass(frozen=True)
class Costs:
    """Time that the runs of a sweep take."""

    full_s: float
    """Training time of a whole run in seconds."""
    extra_s: float
    """Seconds that a run takes to load and to evaluate, at each start."""
    devices: int = 1
    """Number of runs that train at the same time."""

    def of_rounds(self, trials: int, rounds: int, first: int = 1) -> float:
        """Return the seconds of rounds ``first`` to ``rounds`` if ``trials`` trials begin round ``first``."""
        seconds = 0.0
        for number in range(first, rounds + 1):
            seconds += self.of_round(trials, number, rounds)
            trials = kept_of(trials)
        return seconds

    def of_round(self, trials: int, round_: int, rounds: int) -> float:
        """Return the seconds that ``trials`` trials take to train round ``round_``."""
        trained = share_of(round_, rounds) - (share_of(round_ - 1, rounds) if round_ > 1 else 0.0)
        return _CAUTION * math.ceil(trials / self.devices) * (trained * self.full_s + self.extra_s)

    def of_whole_runs(self, runs: int) -> float:
        """Return the seconds that ``runs`` runs take to train from their first step to their last."""
        return self.of_rounds(runs, 1)


@dataclass(frozen=True)
class Plan:
    """Trials and rounds of a group."""

    trials: int
    rounds: int


def plan_group(
    costs: Costs, seconds: float, *, trials: int, rounds: int, can_halve: bool, confirmations: int
) -> Plan | None:
    """Return the plan with the most trials that fit in the available time.

    The runs that confirm the winner must also fit.

    Args:
        costs: Time that runs take.
        seconds: Available time.
        trials: Maximum number of trials; 0 for ``_MOST_TRIALS``, which is always the upper limit.
        rounds: Number of rounds; 0 for three, or one if the schedule or the time does not allow three.
        can_halve: Whether the schedule allows more than one round.
        confirmations: Number of whole runs after the last round.

    Returns:
        The plan; None if not even one trial fits.
    """
    seconds -= costs.of_whole_runs(confirmations)
    for tried in (rounds,) if rounds else (AUTO_ROUNDS, 1) if can_halve else (1,):
        fewest = 1 if rounds or tried == 1 else HALVING ** (tried - 1)
        most = min(trials or _MOST_TRIALS, _MOST_TRIALS)
        fitting = (
            number for number in range(most, fewest - 1, -1) if costs.of_rounds(number, tried) <= seconds
        )
        if number := next(fitting, 0):
            return Plan(number, tried)
    return None


def keep_best(
    losses: Mapping[int, float | None],
    of_round: int,
    costs: Costs | None,
    seconds: float,
    round_: int,
    rounds: int,
) -> tuple[int, ...]:
    """Return the trials that continue to the next round: the best half, or fewer if time is short.

    Args:
        losses: Validation loss of each trial at the end of the round; None if the trial failed.
        of_round: Number of trials that began the round.
        costs: Time that runs take; None if the sweep has no deadline.
        seconds: Time left for the remaining rounds.
        round_: The round that ended, from 1.
        rounds: Number of rounds.
    """
    ranked = sorted((loss, number) for number, loss in losses.items() if loss is not None)
    kept = min(kept_of(of_round), len(ranked))
    while costs is not None and kept > 1 and costs.of_rounds(kept, rounds, round_ + 1) > seconds:
        kept -= 1
    return tuple(number for _, number in ranked[:kept])


Basis: TypeAlias = Literal["confirmed", "one_run", "not_lower", "noise_unknown", "no_result"]
"""Basis of a verdict. ``confirmed``: runs of winner and base with other seeds. ``one_run``: the winner's
only run, which was selected for its loss. ``not_lower``: no trial has a lower loss than the base."""


@dataclass(frozen=True)
class Verdict:
    """Whether the best trial is better than the unchanged recipe."""

    basis: Basis
    winner: int | None = None
    """Number of the trial with the lowest loss; None if no trial completed all its steps."""
    is_better: bool = False
    base: float | None = None
    """Mean validation loss of the base's runs."""
    found: float | None = None
    """Mean validation loss of the winner's runs with other seeds or, without such runs, the loss for which
    the winner was selected.
    """
    noise: float | None = None
    """Standard deviation between seeds, pooled; None if unknown."""
    margin: float | None = None
    """Difference that is exceeded by chance in one of twenty sweeps."""
    base_runs: int = 0
    found_runs: int = 0


def judge(winner: int, selected: float, fresh: Sequence[float], base: Sequence[float]) -> Verdict:
    """Compare a winner with the base by a one-sided two-sample t test with pooled variance at 95 %.

    Args:
        winner: Number of the winning trial.
        selected: Loss of the run for which the winner was selected.
        fresh: Losses of the winner's runs with other seeds, which did not affect the selection.
        base: Losses of the base's runs, each with a different seed. The first has the seed of the trials.
    """
    found = fresh or [selected]
    result = {
        "winner": winner,
        "base": mean(base),
        "found": mean(found),
        "base_runs": len(base),
        "found_runs": len(found),
    }
    if selected >= base[0]:
        return Verdict("not_lower", winner, base=base[0], found=selected, base_runs=1, found_runs=1)
    freedom = len(base) + len(found) - 2
    if freedom < 1:
        return Verdict("noise_unknown", **result)  # type: ignore[arg-type]  # the fields above
    squares = sum((len(losses) - 1) * stdev(losses) ** 2 for losses in (base, found) if len(losses) > 1)
    noise = math.sqrt(squares / freedom)
    margin = _T_95[min(freedom, len(_T_95)) - 1] * noise * math.sqrt(1 / len(base) + 1 / len(found))
    return Verdict(
        "confirmed" if fresh else "one_run",
        **result,  # type: ignore[arg-type]  # the fields above
        is_better=bool(fresh) and mean(base) - mean(found) > margin,
        noise=noise,
        margin=margin,
    )
