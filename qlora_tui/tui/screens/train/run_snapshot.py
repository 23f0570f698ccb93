"""A run at one moment, as the follower hands it to the panels of the live screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.events import STEP_PHASES, Evaluated, Health, PhaseChanged, SampleGenerated
from qlora_tui.runs.status import ACTIVE, Status
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.runs.telemetry import Reading
from qlora_tui.runs.view import RunView
from qlora_tui.tui.render.series import Envelope
from qlora_tui.tui.screens.train.log_tail import LogEntry


@dataclass(frozen=True)
class StepEnvelopes:
    """What is drawn over the steps."""

    loss: Envelope
    mean_loss: Envelope
    """Running mean of the loss."""
    learning_rate: Envelope
    grad_norm: Envelope
    tokens_per_s: Envelope
    reward_margin: Envelope


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run at one moment, for the live screen."""

    view: RunView
    """Only its single values are for the screen: its columns change in the follower's thread."""
    status: Status
    envelopes: StepEnvelopes
    step: int
    epoch: float
    loss: float | None
    """Of the last step, like the next five."""
    mean_loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_s: float | None
    reward_margin: float
    """NaN without a preference method."""
    evaluations: tuple[Evaluated, ...]
    best: Evaluated | None
    samples: tuple[SampleGenerated, ...]
    health: tuple[Health, ...]
    entries: Sequence[LogEntry]
    """Log lines so far; only appended to."""
    output: Sequence[LogEntry]
    """The end of the trainer's own output."""
    telemetry: tuple[Reading, ...]
    """The newest last."""
    energy_kwh: float | None
    seconds_trained: float
    """Training time of all steps, without evaluations and pauses."""
    seconds_left: float | None
    seconds_per_step: float | None
    """Recently; None until it is known."""
    fix: SuggestedFix | None
    """What one key can do about the latest warning."""
    step_stride: int
    """Steps from one drawn step to the next: more than 1 in a very long run."""
    stages: tuple[PhaseChanged, ...] = ()
    """The first phases of this attempt."""
    recipe: Recipe | None = None
    """None if it cannot be read."""
    ending_request: str = ""
    """The request to end the run that waits or was taken, one of ``control.ENDINGS``; empty without one."""

    @property
    def is_stopping(self) -> bool:
        """Whether the run will stop after the step or evaluation in progress, as requested."""
        is_asked = self.ending_request in ("stop", "stop_now")
        return is_asked and self.status.state in ACTIVE and self.view.phase in STEP_PHASES

    @property
    def is_best_saved(self) -> bool:
        """Whether there is a checkpoint of the best evaluation's step; the trainer keeps it."""
        return self.best is not None and any(saved.step == self.best.step for saved in self.view.checkpoints)

    @property
    def has_validation(self) -> bool:
        """Whether validation loss is measured, as far as is known."""
        return self.view.data is None or bool(self.view.data.validation_samples)
