"""Lines about the demo's run where stderr is not a terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.cli.demo import DemoProgress
from tests.support.step_events import a_step


@pytest.mark.parametrize(("seconds", "end"), [(None, "tok/s\n"), (71.0, "tok/s  71 s left\n")])
def test_time_left_is_shown_once_it_is_known(
    seconds: float | None, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    view: Any = SimpleNamespace(total_steps=95, seconds_left=seconds)
    DemoProgress().on_event(a_step(), view)
    assert capsys.readouterr().err.endswith(end)
