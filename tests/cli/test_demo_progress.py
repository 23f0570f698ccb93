"""Lines about the demo's run where stderr is not a terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.cli.demo import DemoProgress
from qlora_tui.runs.events import Step


@pytest.mark.parametrize(("seconds", "end"), [(None, "tok/s\n"), (71.0, "tok/s  71 s left\n")])
def test_time_left_is_shown_once_it_is_known(
    seconds: float | None, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    view: Any = SimpleNamespace(total_steps=95, seconds_left=seconds)
    step = Step(
        at=0.0,
        step=1,
        epoch=0.1,
        loss=4.2,
        learning_rate=1e-4,
        grad_norm=0.9,
        tokens=300,
        tokens_per_s=300.0,
    )
    DemoProgress().on_event(step, view)
    assert capsys.readouterr().err.endswith(end)
