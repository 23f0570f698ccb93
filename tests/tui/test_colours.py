"""A run in every state, at every size, in every kind of colours; and every screen legible in every theme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.themes import load_themes
from tests.tui.look import colours_of, illegible, styles_of
from tests.tui.played import BEGAN
from tests.tui.seeing import shows, text_of, until
from tests.tui.test_snapshots_runs import (
    STATES_ONCE,
    same_machine,
    three_runs,
    watching,
)
from tests.tui.workstation import config_folder, open_on

__all__ = ["same_machine"]

SIZES = {"80x24": (80, 24), "120x40": (120, 40), "200x60": (200, 60)}
COLOURS = {"light": "paper", "sixteen": "terminal-dark"}
TRUECOLOUR = [theme.name for theme in load_themes()[0] if not theme.ansi]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("state", STATES_ONCE)
async def test_a_run_in_every_state_at_every_size_in_every_kind_of_colours(
    state: str,
    size: str,
    set_clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    snapshot: Any,
) -> None:
    run, now = STATES_ONCE[state]()
    set_clock(now)
    app = QloraApp()
    async with app.run_test(size=SIZES[size]) as pilot:
        await watching(run)(pilot)
        shown, looks = text_of(app), {"dark": styles_of(app)}
        assert not illegible(app)
        for name, theme in COLOURS.items():
            await dressed(pilot, theme)
            assert text_of(app) == shown
            assert not illegible(app)
            looks[name] = styles_of(app)
        assert colours_of(app) <= {"default", "standard"}
    monkeypatch.setenv("NO_COLOR", "1")
    app = QloraApp()
    async with app.run_test(size=SIZES[size]) as pilot:
        await watching(run)(pilot)
        assert text_of(app) == shown
        assert not colours_of(app)
        looks["none"] = styles_of(app)
    assert shown == snapshot(name="text")
    for name, look in looks.items():
        assert look == snapshot(name=name)


VISITED = {
    "home": ("0", "Next"),
    "models": ("1", "On the hub"),
    "data": ("2", "No data yet"),
    "memory": ("3", "NF4"),
    "lora": ("4", "r R rank"),
    "train": ("5", "Not ready"),
    "runs": ("6", "v Compare"),
    "a filter": ("6 slash", "Filter"),
    "a comparison": ("6 j space space v", "runs compared"),
    "chat": ("7", "Chat"),
    "sampling": ("7 o", "How to answer"),
    "presets": ("p", "enter opens"),
    "help": ("question_mark", "Help"),
    "all keys": ("f1", "Keys"),
    "a file": ("2 o", "enter"),
}
"""Keys, and what is waited for."""


@pytest.mark.parametrize("screen", VISITED)
async def test_every_word_of_a_screen_stands_out(
    screen: str, private_home: Path, set_clock: Callable[[float], None]
) -> None:
    set_clock(BEGAN + 6000)
    three_runs()
    app = open_on("memory", model=str(config_folder(private_home, "HuggingFaceTB__SmolLM2-135M")))
    keys, text = VISITED[screen]
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "▸ NF4")
        await pilot.press(*keys.split())
        await shows(pilot, text)
        for theme in TRUECOLOUR:
            await dressed(pilot, theme)
            assert not illegible(app), theme


async def dressed(pilot: Pilot[Any], theme: str) -> None:
    """In another theme, all of the screen."""
    app, before = pilot.app, styles_of(pilot.app)
    if app.theme != theme:
        app.theme = theme
        await until(pilot, lambda: styles_of(app) != before)
    await pilot.pause(0.2)
