"""Thinking on the command line: what ``data`` shows of it, and what ``chat`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.tui.test_data_screen import rows, thinking_model


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    """A file of which row 2 has reasoning, and a model that can think."""
    return (str(rows(tmp_path / "rows.jsonl")), "--model", thinking_model(tmp_path))


@pytest.mark.slow
def test_a_row_is_shown_as_the_settings_have_it(call: Call, words: tuple[str, ...]) -> None:
    shown = call("data", "show", *words, "--row", "2").out
    assert "⟦<think>\nI count.\n</think>\n\n51⟧" in shown and "Reasoning is learned." in shown
    read = call("data", "show", *words, "--row", "2", "--reasoning-not-in-loss").out
    assert "<think>\nI count.\n</think>\n\n⟦51⟧" in read
    off = call("data", "show", *words, "--row", "2", "--thinking", "off").out
    assert "I count." not in off and "<think>\n\n</think>\n⟦51⟧" in off


@pytest.mark.slow
def test_a_file_is_looked_over_as_the_settings_have_it(call: Call, words: tuple[str, ...]) -> None:
    said = call("data", "inspect", *words).out
    assert "Reasoning: 1 of 3 rows, learned." in said
    assert "Thinking: on for the 1 row with reasoning, off for 2 without (enable_thinking)." in said
    assert "note: Rendered with thinking" not in said
    report = call("data", "inspect", *words, "--thinking", "off", "--json").json
    assert report["thinking"][0] == "Reasoning: 1 of 3 rows, left out."
