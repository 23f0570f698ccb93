"""Events that tests of the Train screen append to a run."""

from __future__ import annotations

from qlora_tui.runs.events import Health, Step
from tests.tui.fake_runs import BEGAN


def health_event(kind: str, remedy: str) -> Health:
    return Health(at=BEGAN, kind=kind, severity="warning", evidence="It is odd.", remedy=remedy, step=50)


def step_event(number: int, loss: float | None = 1.5) -> Step:
    return Step(
        at=BEGAN + 40 + number * 1.5,
        step=number,
        epoch=number / 1500,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=number * 3500,
        tokens_per_s=2310.0,
    )
