"""Progress on stderr, in a terminal and elsewhere."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.cli.demo import DemoProgress
from qlora_tui.cli.subcommand import ProgressLine
from tests.support.step_events import a_step


@pytest.mark.parametrize(("seconds", "end"), [(None, "tok/s\n"), (71.0, "tok/s  71 s left\n")])
def test_time_left_is_shown_once_it_is_known(
    seconds: float | None, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    view: Any = SimpleNamespace(total_steps=95, seconds_left=seconds)
    DemoProgress().on_event(a_step(), view)
    assert capsys.readouterr().err.endswith(end)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_takes_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    screen = StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    with ProgressLine() as line:
        line.show("Writing")
        line.show("too early")
        line.show("Writing the file " * 9, is_due=True)
    lines = screen.getvalue().splitlines()
    if is_terminal:
        assert "\n" not in screen.getvalue()
        assert screen.getvalue().endswith("\r\x1b[K") and max(map(len, lines)) < 60
    else:
        assert lines == ["Writing", "Writing the file " * 9]


def test_a_share_is_a_bar_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, start in ((True, f"[{'#' * 15}{'.' * 15}] 50%  "), (False, "")):
        screen, seconds = StringIO(), iter([100.0, 100.0, 120.0, 120.0])
        monkeypatch.setattr(screen, "isatty", lambda shown=is_terminal: shown)
        monkeypatch.setattr("sys.stderr", screen)
        clock = SimpleNamespace(monotonic=lambda now=seconds: next(now))
        monkeypatch.setattr("qlora_tui.cli.subcommand.time", clock)
        line = ProgressLine()
        line.show_share(100, 1000, "rows")
        line.show_share(500, 1000, "rows")
        assert screen.getvalue().rstrip().endswith(f"{start}500 of 1,000 rows  25 s left")
