"""Saves checkpoints during training, together with the progress that transformers does not save."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field

from qlora_tui.errors import disk_problem
from qlora_tui.formatting import uncapitalize
from qlora_tui.runs.events import CheckpointSaved
from qlora_tui.training import checkpoints
from qlora_tui.training.checkpoints import CheckpointState
from qlora_tui.training.failure import is_full_disk
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.trainer import RunTrainer


@dataclass
class RunProgress:
    """What changes from step to step and is not part of transformers' ``TrainerState``."""

    best_step: int | None = None
    best_score: float | None = None
    """Validation loss, with the weighted divergence from the base, at the best step: the lowest is best."""
    loss_before_training: float | None = None
    """Validation loss at step 0; None where it was not measured."""
    scores_since_best: list[float] = field(default_factory=list)
    """Scores of the evaluations since the best, for early stopping."""
    evaluated_step: int = -1
    """Step of the last evaluation; -1 before the first."""
    evaluation_due: bool = False
    """Whether the evaluation at that step has begun and not ended: a stop may end it."""
    checkpoint_step: int = -1
    """Step of the last checkpoint; -1 before the first."""
    initial_weights: str = ""
    """Digest of the trained weights before the first step; empty where an earlier version began the run."""
    ends_with_epoch: bool = False
    """Whether it was requested to finish at the end of the epoch."""

    @classmethod
    def restored_from(cls, state: CheckpointState) -> RunProgress:
        """The progress at a checkpoint."""
        return cls(
            best_step=state.best_step,
            best_score=state.best_score,
            loss_before_training=state.loss_before_training,
            scores_since_best=list(state.scores_since_best),
            initial_weights=state.initial_weights,
            evaluated_step=state.step,
            evaluation_due=state.evaluation_due,
            checkpoint_step=state.step,
        )

    def add_score(self, step: int, score: float, loss: float) -> bool:
        """Remember the score and the validation loss of an evaluation; True where it is the best so far."""
        if step <= 0:
            # No candidate, since the adapter has learned nothing, but what later ones are compared with.
            self.loss_before_training = loss
            return False
        best = math.isfinite(score) and (self.best_score is None or score < self.best_score)
        if best:
            self.best_score, self.best_step, self.scores_since_best = score, step, []
        else:
            self.scores_since_best.append(score)
        return best


class CheckpointSaver:
    """Writes checkpoints of a run, reports them, and deletes old ones."""

    def __init__(self, prepared: PreparedRun, trainer: RunTrainer) -> None:
        self._prepared = prepared
        self._trainer = trainer

    def save(self, step: int, progress: RunProgress, *, force: bool) -> None:
        """Write a checkpoint, and note its step in ``progress``.

        A full or failing disk costs the checkpoint, not the run.

        Raises:
            OSError: with ``force``, the checkpoint could not be written.
        """
        prepared = self._prepared
        prepared.reporter.phase("saving", f"checkpoint at step {step}")
        state = CheckpointState(
            step=step,
            tokens=self._trainer.tokens,
            data_hash=prepared.data.data_hash,
            padding_free=prepared.base.padding_free,
            recipe=checkpoints.recipe_text(prepared.recipe),
            base_hash=prepared.base_hash,
            best_step=progress.best_step,
            best_score=progress.best_score,
            loss_before_training=progress.loss_before_training,
            initial_weights=progress.initial_weights,
            scores_since_best=tuple(progress.scores_since_best),
            evaluation_due=progress.evaluation_due,
        )
        try:
            folder = checkpoints.write(
                prepared.run, state, self._trainer.save_checkpoint_files, prepared.dist
            )
        except OSError as error:
            if force:
                raise
            self._report_failure(step, error)
            return
        progress.checkpoint_step = step
        prepared.reporter.emit(
            CheckpointSaved(at=time.time(), step=step, folder=str(folder.relative_to(prepared.run.path)))
        )
        if prepared.dist.is_main_process:
            # What cannot be deleted now is deleted after the next checkpoint.
            with suppress(OSError):
                keep = prepared.recipe.training.keep_checkpoints
                checkpoints.prune(prepared.run, keep, progress.best_step)

    def _report_failure(self, step: int, error: OSError) -> None:
        reporter = self._prepared.reporter
        problem = disk_problem(error, self._prepared.run.checkpoints_dir)
        reason = uncapitalize(problem.title) if problem else str(error)
        reporter.log(f"checkpoint at step {step}: {error}")
        reporter.health(
            "disk_full" if is_full_disk(error) else "checkpoint_unwritten",
            f"The checkpoint at step {step} could not be written: {reason}.",
            "Training continues, and earlier checkpoints are kept. "
            + (f"{problem.why} {problem.fix}".strip() if problem else "Details are in the log."),
            step=step,
        )
