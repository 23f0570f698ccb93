from __future__ import annotations

import pytest
from textual.app import ComposeResult
from textual.widgets import Input, Static

from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.themes import load_themes
from qlora_tui.tui.widgets.panel import Panel

XTERM_LEVELS = (0x00, 0x5F, 0x87, 0xAF, 0xD7, 0xFF)
XTERM_GRAYS = tuple(range(0x08, 0xEF, 10))


class TwoPanels(WorkScreen):
    MODE = "home"

    def compose_body(self) -> ComposeResult:
        yield Panel("Run [a] of 2", Input(), keys=(("app.undo", "undo it"),), id="first")
        yield Panel("Other", Static("text"), id="other")


async def test_the_panel_with_the_focus_has_another_border() -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await app.push_screen(TwoPanels())
        await pilot.pause()
        first, other = app.screen.query(Panel)
        blurred = other.styles.border_top[1]
        assert first.styles.border_top[1] == blurred
        first.query_one(Input).focus()
        await pilot.pause()
        assert first.styles.border_top[1] != blurred
        assert other.styles.border_top[1] == blurred


@pytest.mark.parametrize("name", ["background", "surface", "panel"])
def test_backgrounds_look_the_same_in_256_colors(name: str) -> None:
    themes, problems = load_themes()
    assert not problems
    for theme in themes:
        assert is_in_palette(getattr(theme, name) or "ansi_default"), (theme.name, name)


@pytest.mark.parametrize("name", ["block-cursor-background", "block-cursor-blurred-background"])
def test_cursors_look_the_same_in_256_colors(name: str) -> None:
    for theme in load_themes()[0]:
        assert is_in_palette(theme.variables.get(name, "ansi_default")), (theme.name, name)


def is_in_palette(color: str) -> bool:
    """Whether an xterm of 256 colors has exactly this one, or the color is one of the terminal's 16."""
    if color.startswith("ansi_"):
        return True
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    is_gray = red == green == blue and red in XTERM_GRAYS
    return is_gray or all(part in XTERM_LEVELS for part in (red, green, blue))
