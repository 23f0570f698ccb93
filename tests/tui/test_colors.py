"""A run in every state, at two sizes, in every kind of colors; and every screen legible in every theme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from qlora_tui import paths
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.themes import load_themes
from tests.tui.fake_runs import BEGAN
from tests.tui.run_states import STATES_ONCE, three_runs, watching
from tests.tui.screen_assertions import segments_of, text_in, text_of, wait_for_text, wait_until
from tests.tui.style_dump import colors_of, illegible, styles_in, styles_of
from tests.tui.workstation import config_folder, open_on

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_machine")]

SIZES = {"80x24": (80, 24), "120x40": (120, 40)}
COLORS = {
    "dark": ("harbour", {"truecolor"}),
    "light": ("paper", {"truecolor"}),
    "sixteen": ("terminal-dark", {"default", "standard"}),
}
"""A theme of each kind, and what its colors may be."""
_AS_SINGLE_BORDERS = str.maketrans("═║╔╗╚╝", "─│╭╮╰╯")
"""Without colors the panel with the focus has a double border."""
_STILL = 6
"""Looks of a twentieth of a second: three of the app's own, in tests."""
_STILL_IN_THEME = 3
"""After another theme, which changes no text: one of the app's own."""
SHIPPED = {path.stem for path in paths.shipped_dir("themes").glob("*.toml")}
TRUECOLOR = [theme.name for theme in load_themes()[0] if not theme.ansi and theme.name in SHIPPED]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("state", STATES_ONCE)
async def test_every_run_state_size_and_color_mode_renders(
    state: str,
    size: str,
    set_clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    snapshot: Any,
) -> None:
    run, now = STATES_ONCE[state]()
    set_clock(now)
    looks = {}
    app = QloraApp()
    async with app.run_test(size=SIZES[size]) as pilot:
        await watching(run)(pilot)
        shown = await settled(pilot)
        for name, (theme, colors) in COLORS.items():
            await dressed(pilot, theme)
            assert text_of(app) == shown
            assert not illegible(app)
            assert colors_of(app) and colors_of(app) <= colors
            looks[name] = styles_of(app)
    monkeypatch.setenv("NO_COLOR", "1")
    app = QloraApp()
    async with app.run_test(size=SIZES[size]) as pilot:
        await watching(run)(pilot)
        plain = await settled(pilot)
        assert plain.translate(_AS_SINGLE_BORDERS) == shown
        assert not colors_of(app)
        looks["none"] = styles_of(app)
    assert shown == snapshot(name="text")
    for name, look in looks.items():
        assert look == snapshot(name=name)


VISITED = {
    "home": ("0", "▸ Enter"),
    "models": ("1", "Worth starting with"),
    "data": ("2", "No data yet"),
    "memory": ("3", "▸ NF4"),
    "lora": ("4", "r R rank"),
    "train": ("5", "Not ready"),
    "runs": ("6", "tickets-a"),
    "a filter": ("6 slash", "Part of a name"),
    "a comparison": ("6 j space space v", "runs compared"),
    "chat": ("7", "Nothing to chat with yet"),
    "sampling": ("7 o", "Sampling"),
    "presets": ("p", "Enter open"),
    "help": ("question_mark", "Help: Memory"),
    "all keys": ("f1", "Help: all keys"),
    "a file": ("2 o", "Tab complete"),
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
        await wait_for_text(pilot, "▸ NF4")
        await pilot.press(*keys.split())
        await wait_for_text(pilot, text)
        # Every theme is on every second screen; what a theme makes of a color is the same on each.
        for theme in TRUECOLOR[list(VISITED).index(screen) % 2 :: 2]:
            await dressed(pilot, theme)
            assert not illegible(app), theme


async def dressed(pilot: Pilot[Any], theme: str) -> None:
    """In another theme, all of the screen."""
    app, before = pilot.app, styles_of(pilot.app)
    if app.theme != theme:
        app.theme = theme
        await wait_until(pilot, lambda: styles_of(app) != before)
    await settled(pilot, _STILL_IN_THEME)


async def settled(pilot: Pilot[Any], looks: int = _STILL) -> str:
    """The screen's text, once text and colors stay as they are over so many looks."""
    seen: list[tuple[str, str]] = []

    def stays() -> bool:
        painted = segments_of(pilot.app)
        seen.append((text_in(painted), styles_in(painted)))
        return len(seen) > looks and len(set(seen[-looks:])) == 1

    await wait_until(pilot, stays)
    return seen[-1][0]
