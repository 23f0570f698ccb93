"""Watching a run for what goes wrong in training: each finding with its evidence and what to do.

Pure: numbers in, findings out. :mod:`qlora_tui.training.edge` feeds it, :mod:`qlora_tui.training.telemetry`
has its own watch over the card.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

_HISTORY = 20
"""Steps that the gradient norm is compared with."""
_EXPLOSION = 20.0
"""Times the usual norm: after clipping such a step still points somewhere odd."""
_QUIET_STEPS = 20
"""Steps before the same finding is told again."""


@dataclass(frozen=True)
class Finding:
    """Something wrong or odd."""

    kind: str
    evidence: str
    remedy: str


class StepWatch:
    """Looks at each step's loss and gradient norm."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_HISTORY)
        self._losses: deque[float] = deque(maxlen=2 * _HISTORY)
        self._told: dict[str, int] = {}

    def step(self, step: int, loss: float, grad_norm: float) -> list[Finding]:
        """What step ``step`` shows."""
        findings = []
        if loss == 0.0:
            findings.append(
                Finding(
                    "zero_loss",
                    f"The loss is exactly 0 at step {step}.",
                    "Look at the masks on the Data screen: it seems that nothing is left to learn.",
                )
            )
        usual = median(self._norms) if len(self._norms) == _HISTORY else math.inf
        if math.isfinite(grad_norm) and grad_norm > _EXPLOSION * max(usual, 1e-6):
            findings.append(
                Finding(
                    "exploding_gradient",
                    f"The gradient norm is {grad_norm:.3g} at step {step}, where {usual:.3g} was usual.",
                    "Lower training.learning_rate or training.max_grad_norm if it goes on.",
                )
            )
        if math.isfinite(grad_norm):
            self._norms.append(grad_norm)
        self._losses.append(loss)
        return [f for f in findings if self._is_new(f.kind, step)]

    def _is_new(self, kind: str, step: int) -> bool:
        told = self._told.get(kind)
        if told is not None and step - told < _QUIET_STEPS:
            return False
        self._told[kind] = step
        return True
