"""The weights that the result of a run has: of which step they are, and whether a saved step is better.

Train, Chat and Export say of which step the weights are in the words of :func:`weights_words`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_tui.runs.run_summary import RunSummary

NOTABLE_RISE = 0.01
"""Minimum rise of the validation loss, as a share of the loss, that is worth a word or a color. Smaller
differences are common between two evaluations of a model that no longer learns.
"""


def is_notably_above(loss: float, lowest: float) -> bool:
    """Return whether a validation loss is above the lowest one by more than ``NOTABLE_RISE``."""
    return loss > lowest * (1 + NOTABLE_RISE)


def better_step(
    best: tuple[float, int] | None, evaluations: Sequence[tuple[int, float]], saved: Collection[int]
) -> int | None:
    """Return the step of the best evaluation if its checkpoint is saved, and the last validation loss is
    notably above its loss; otherwise None.

    Args:
        best: Lowest validation loss, and its step; None without an evaluation.
        evaluations: Step and validation loss in order.
        saved: Steps of the saved checkpoints.
    """
    if best is None or not evaluations or not is_notably_above(evaluations[-1][1], best[0]):
        return None
    return best[1] if best[1] in saved else None


def better_checkpoint(summary: RunSummary, saved: Collection[int]) -> int | None:
    """Return the step of the saved checkpoint that is notably better than the last weights; None if there is
    no such checkpoint. Chat and Export propose this checkpoint instead of the final adapter. For a run with
    ``ended_early``, the result is None, because its final adapter may already be from the best step.

    ``saved``: steps of the saved checkpoints.
    """
    return None if summary.ended_early else better_step(summary.best, summary.evaluations, saved)


def weights_words(step: int, *, last: int, total: int, best: int | None) -> str:
    """Return a step, and whether it is the best or the last one: ``step 640 (best)``.

    Args:
        step: The step of the weights.
        last: The last step of the run.
        total: Number of steps of the whole run; 0 if unknown.
        best: The step with the lowest validation loss; None without an evaluation.
    """
    of_all = f" of {total:,}" if step == last < total else ""
    role = " (best)" if step == best else " (last)" if step == last else ""
    return f"step {step:,}{of_all}{role}"


def summary_weights(summary: RunSummary, step: int | None) -> str:
    """Return the words for the weights of a checkpoint or, if ``step`` is None, of the final adapter. If the
    run ended early, the reason says of which step the final adapter is.
    """
    if step is None and summary.ended_early:
        return f"final adapter ({summary.status.detail})"
    best = None if summary.best is None else summary.best[1]
    at = summary.step if step is None else step
    return weights_words(at, last=summary.step, total=summary.total_steps, best=best)
