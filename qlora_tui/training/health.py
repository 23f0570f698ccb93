"""Detects problems in training. Each finding has evidence and a remedy.

The code here only computes on numbers that it is given. :mod:`qlora_tui.training.loop` passes the loss and
gradient norm of each step and the results of evaluations; :mod:`qlora_tui.training.reporter` passes the
metrics of the GPU.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

from qlora_tui.formatting import pluralize
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.runs.describe import MUCH_FORGETTING, forgetting_evidence
from qlora_tui.runs.events import GeneralAnswers
from qlora_tui.runs.suggested_fix import FEW_STEPS

_HISTORY = 20
"""Number of previous steps that a gradient norm is compared with."""
_EXPLOSION = 20.0
"""Multiple of the median norm that counts as exploding: such a step has a wrong direction even if clipped."""
_SKIPPED_STEPS = 12
"""Number of consecutive steps skipped under fp16 at which the run ends.

Each skipped step halves the loss scale, which begins at 65,536, so the limit is reached at a scale of 16.
"""
_REMEMBER = (
    "If other abilities matter, raise Replay share (the base's own answers in the training data) by 0.1, or "
    "lower Learning rate, Epochs or Rank."
)
"""Remedy for a model that answers general prompts differently from its base."""
OVERFLOW_REMEDY = 'Set Compute dtype to "bfloat16" on an RTX 30 GPU or newer, otherwise to "float32".'
_QUIET_STEPS = 20
"""Number of steps before the same finding is reported again."""
_PLATEAU_STEPS = 200
"""Number of steps whose later half is compared with the earlier half."""
_PLATEAU = 0.002
"""Share by which the mean loss must fall from the earlier half to the later one."""
_WORSE = 0.05
"""A validation loss counts as clearly worse if it exceeds the one before training by more than this share."""
_MANY_ANSWERS = 0.25
"""Minimum share of general answers that must be worse than those of the base for a finding."""
_IDLE_S = 60.0
_IDLE_PERCENT = 5
_USED_BYTES = 1 << 30
_THROTTLED_S = 30.0
_HOT = frozenset(("thermal", "power brake", "hardware slowdown"))
"""Throttle reasons that a user can fix. A power cap is normal for a GPU under load."""


@dataclass(frozen=True)
class Finding:
    """A problem or an unusual observation, with evidence and remedy."""

    kind: str
    evidence: str
    remedy: str


def too_few_steps(total: int, max_steps: int = 0) -> Finding | None:
    """Return a finding if a run has too few optimizer steps to learn anything.

    ``max_steps`` is the recipe's limit, 0 for none.
    """
    if total >= FEW_STEPS:
        return None
    few = f"The run has only {pluralize(total, 'optimizer step')}"
    if max_steps and total == max_steps:
        return Finding(
            "few_steps",
            f"{few}: Max steps is {max_steps}.",
            "Raise Max steps, or set it to 0 to train all epochs.",
        )
    return Finding(
        "few_steps",
        f"{few}.",
        "Lower Gradient accumulation or Sequence length, or raise Epochs.",
    )


def find_non_finite(step: int, loss: float, grad_norm: float, *, norm_may_overflow: bool) -> Finding | None:
    """Return a finding that ends the run if loss or gradient norm is NaN or infinite.

    With ``norm_may_overflow``, as under fp16, only the loss is checked. A norm that is not finite is routine
    there: the step is skipped and the loss scale is lowered; see :class:`OverflowMonitor`.
    """
    if not math.isfinite(loss):
        quantity, value = "loss", loss
    elif not math.isfinite(grad_norm) and not norm_may_overflow:
        quantity, value = "gradient norm", grad_norm
    else:
        return None
    return Finding(
        "nan_loss",
        f"The {quantity} is {value} at step {step}.",
        "Lower Learning rate or raise Warmup ratio, and start again. If the run diverges again, change "
        "Compute dtype.",
    )


class OverflowMonitor:
    """Counts the steps that fp16 skips because their gradients overflow."""

    def __init__(self) -> None:
        self.skipped = 0
        """Number of steps that were skipped."""
        self._in_a_row = 0

    def check(self, step: int, *, is_skipped: bool) -> Finding | None:
        """Return a finding that ends the run if too many steps in a row were skipped."""
        self.skipped += is_skipped
        self._in_a_row = self._in_a_row + 1 if is_skipped else 0
        if self._in_a_row < _SKIPPED_STEPS:
            return None
        return Finding(
            "gradients_overflow",
            f"The gradients overflowed float16 in {self._in_a_row} consecutive steps, up to step {step}.",
            OVERFLOW_REMEDY,
        )


class ValidationMonitor:
    """Compares each evaluation with the one before training."""

    def __init__(self) -> None:
        self._is_worse = False

    def check(self, step: int, loss: float, before: float | None) -> Finding | None:
        """Return a finding if the loss is clearly worse than ``before``. Return another one only if the loss
        has recovered in between.
        """
        if not step or before is None:
            return None
        was_worse, self._is_worse = self._is_worse, not loss <= before * (1 + _WORSE)
        if was_worse or not self._is_worse:
            return None
        return Finding(
            "worse_than_before",
            f"The validation loss is {loss:.3g} at step {step}; before training it was {before:.3g}.",
            "Lower Learning rate and start a new run.",
        )


class ForgettingMonitor:
    """Warns once if the answers to general prompts diverge more from the base than learning a style would
    explain.
    """

    def __init__(self) -> None:
        self._reported = False

    def check(self, step: int, divergence: float, turn_ends: float | None) -> Finding | None:
        """Return a finding, once, if the model answers general prompts differently from its base.

        Args:
            divergence: mean KL(base ‖ model), in nats.
            turn_ends: share of the base's turn ends that the model keeps; None if the base has none.
        """
        if not step or self._reported or divergence <= MUCH_FORGETTING:
            return None
        self._reported = True
        return Finding("forgetting", forgetting_evidence(step, divergence, turn_ends), _REMEMBER)


def check_general_answers(answers: GeneralAnswers) -> Finding | None:
    """Return a finding if, compared with the base, many more answers to general prompts run on, loop, refuse,
    or are not valid JSON.
    """
    lost = [
        f"{count} {verb} (the base: {base})"
        for count, base, verb, worse in (
            (answers.ended, answers.base_ended, "end their turn", answers.base_ended - answers.ended),
            (answers.looping, answers.base_looping, "loop", answers.looping - answers.base_looping),
            (answers.refused, answers.base_refused, "refuse", answers.refused - answers.base_refused),
        )
        if worse >= _MANY_ANSWERS * answers.answers
    ]
    if answers.base_json_valid - answers.json_valid >= max(2, _MANY_ANSWERS * answers.json_prompts):
        lost.append(
            f"{answers.json_valid} of the {answers.json_prompts} answers that should be JSON are valid "
            f"(the base: {answers.base_json_valid})"
        )
    if not lost:
        return None
    return Finding(
        "general_answers",
        f"Forgetting: of {answers.answers} answers to general prompts, {', '.join(lost)}.",
        _REMEMBER,
    )


class GpuMonitor:
    """Checks each reading of a GPU during training."""

    def __init__(self, name: str = "The GPU") -> None:
        """Set up the monitor of one GPU. ``name`` begins the evidence of its findings."""
        self._name = name
        self._idle_since: float | None = None
        self._hot_since: float | None = None
        self._reported: set[str] = set()

    def check(self, reading: GpuMetrics, now: float) -> list[Finding]:
        """Return the findings of a reading; each kind is reported once until its cause has passed.

        Args:
            now: seconds of a monotonic clock.
        """
        return [*self._idle(reading, now), *self._throttled(reading, now)]

    def _idle(self, reading: GpuMetrics, now: float) -> list[Finding]:
        busy, used_bytes = reading.utilization_percent, reading.memory_used_bytes or 0
        if busy is None or busy > _IDLE_PERCENT or used_bytes < _USED_BYTES:
            self._idle_since = None
            self._reported.discard("gpu_idle")
            return []
        self._idle_since = now if self._idle_since is None else self._idle_since
        return self._once(
            now - self._idle_since >= _IDLE_S,
            Finding(
                "gpu_idle",
                f"{self._name} has been idle for {_IDLE_S:.0f} s with "
                f"{used_bytes / 2**30:.1f} GiB of its memory in use.",
                "Check whether the machine is swapping or another process is using the CPU.",
            ),
        )

    def _throttled(self, reading: GpuMetrics, now: float) -> list[Finding]:
        reasons = _HOT.intersection(reading.throttle or ())
        if not reasons:
            self._hot_since = None
            self._reported.discard("throttled")
            return []
        self._hot_since = now if self._hot_since is None else self._hot_since
        degrees = "" if reading.temperature_c is None else f" at {reading.temperature_c} °C"
        return self._once(
            now - self._hot_since >= _THROTTLED_S,
            Finding(
                "throttled",
                f"{self._name} has been throttled for {_THROTTLED_S:.0f} s{degrees}: "
                f"{', '.join(sorted(reasons))}.",
                "Improve its cooling (clean the fans), or lower its power limit (nvidia-smi -pl).",
            ),
        )

    def _once(self, shown: bool, finding: Finding) -> list[Finding]:
        if not shown or finding.kind in self._reported:
            return []
        self._reported.add(finding.kind)
        return [finding]


class StepMonitor:
    """Checks the loss and the gradient norm of each step."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_HISTORY)
        self._losses: deque[float] = deque(maxlen=_PLATEAU_STEPS)
        self._reported: dict[str, int] = {}

    def check(self, step: int, loss: float, grad_norm: float) -> list[Finding]:
        """Return the findings of step ``step``."""
        findings = []
        if loss == 0.0:
            findings.append(
                Finding(
                    "zero_loss",
                    f"The loss is exactly 0 at step {step}.",
                    "Check the loss masks on the Data screen: there seems to be nothing to learn.",
                )
            )
        usual = median(self._norms) if len(self._norms) == _HISTORY else math.inf
        if math.isfinite(grad_norm) and grad_norm > _EXPLOSION * max(usual, 1e-6):
            findings.append(
                Finding(
                    "exploding_gradient",
                    f"The gradient norm is {grad_norm:.3g} at step {step}; it is usually about {usual:.3g}.",
                    "Lower Learning rate or Max grad norm if this continues.",
                )
            )
        if math.isfinite(grad_norm):
            self._norms.append(grad_norm)
        self._losses.append(loss)
        findings += self._plateau()
        return [f for f in findings if self._is_new(f.kind, step)]

    def _plateau(self) -> list[Finding]:
        if len(self._losses) < _PLATEAU_STEPS:
            return []
        losses = list(self._losses)
        earlier, later = fmean(losses[: _PLATEAU_STEPS // 2]), fmean(losses[_PLATEAU_STEPS // 2 :])
        self._losses.clear()
        if later < earlier * (1 - _PLATEAU):
            return []
        return [
            Finding(
                "plateau",
                f"The mean loss of the last {_PLATEAU_STEPS // 2} steps is {later:.4f}, "
                f"compared with {earlier:.4f} in the {_PLATEAU_STEPS // 2} steps before.",
                "If the validation loss has stopped falling too, more steps will not help.",
            )
        ]

    def _is_new(self, kind: str, step: int) -> bool:
        reported_step = self._reported.get(kind)
        if reported_step is not None and step - reported_step < _QUIET_STEPS:
            return False
        self._reported[kind] = step
        return True
