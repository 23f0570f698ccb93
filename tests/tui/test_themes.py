"""Themes: every text is legible on every ground, and a broken file disables nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.style import Style
from textual.color import Color

from qlora_tui import paths
from qlora_tui.settings import Settings
from qlora_tui.tui.themes import load_themes
from tests.tui.screen_assertions import segments_of, wait_for_text, wait_until
from tests.tui.workstation import open_on

MIN_CONTRAST = 4.5
"""For text, WCAG 2.1, 1.4.3."""


def illegible(app: Any) -> set[str]:
    """Words with low contrast to their background. What is drawn, bars and lines, is not looked at."""
    return {
        f"{one.text.strip()!r} {ratio:.2f}"
        for line in segments_of(app)
        for one in line
        if any(character.isalnum() for character in one.text)
        for ratio in _contrast_of(_seen(one.style))
        if ratio < MIN_CONTRAST
    }


def colors_of(app: Any) -> set[str]:
    """Of what kinds the colors are: default, standard, eight_bit, truecolor; none where there are none."""
    styles = [_seen(one.style) for line in segments_of(app) for one in line]
    return {color.type.name.lower() for style in styles for color in (style.color, style.bgcolor) if color}


def contrast(a: Color, b: Color) -> float:
    """As WCAG 2.1 defines it, from relative luminance: 1 to 21."""
    lighter, darker = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _contrast_of(style: Style) -> Iterator[float]:
    # What a terminal shows for one of its own sixteen is not known.
    if all(color is not None and color.triplet for color in (style.color, style.bgcolor)):
        yield contrast(*map(Color.from_rich_color, (style.color, style.bgcolor)))


def _luminance(color: Color) -> float:
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(part) for part in color.normalized)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _seen(style: Style | None) -> Style:
    """Without what a click runs."""
    return Style() if style is None else style.clear_meta_and_links()


TEXT = ("foreground", "primary", "secondary", "warning", "error", "success", "accent")
GROUNDS = ("background", "surface", "panel")
SHIPPED, PROBLEMS = load_themes()
MINE = """
name = "{name}"
dark = true
primary = "#5fafd7"
secondary = "#87afaf"
warning = "#ffaf5f"
error = "#ff8787"
success = "#87d787"
accent = "#ffd787"
foreground = "{foreground}"
background = "#000000"
surface = "#1c1c1c"
panel = "#262626"
"""


def test_every_shipped_theme_loads() -> None:
    assert not PROBLEMS
    names = {theme.name for theme in SHIPPED}
    assert Settings().theme in names
    assert len(names) >= 4
    assert sum(theme.ansi for theme in SHIPPED) >= 2
    assert {theme.dark for theme in SHIPPED} == {True, False}


@pytest.mark.parametrize("name", [theme.name for theme in SHIPPED if not theme.ansi])
def test_text_is_legible_on_every_ground(name: str) -> None:
    theme = next(theme for theme in SHIPPED if theme.name == name)
    variables = theme.to_color_system().generate() | theme.variables
    inks = {ink: Color.parse(getattr(theme, ink)) for ink in TEXT}
    inks["text-muted"] = Color.parse(variables["text-muted"])
    pairs = [(ink, ground) for ink in inks for ground in GROUNDS]
    dim = {
        f"{ink} on {ground}": round(ratio, 2)
        for ink, ground in pairs
        if (ratio := contrast(inks[ink], Color.parse(getattr(theme, ground)))) < MIN_CONTRAST
    }
    assert not dim
    cursors = ("block-cursor", "block-cursor-blurred")
    for cursor in cursors:
        ground = Color.parse(variables[f"{cursor}-background"])
        assert contrast(Color.parse(variables[f"{cursor}-foreground"]), ground) >= MIN_CONTRAST
        low = {ink: round(contrast(color, ground), 2) for ink, color in inks.items()}
        assert min(low.values()) >= MIN_CONTRAST, (cursor, low)


@pytest.mark.parametrize("name", [theme.name for theme in SHIPPED if theme.ansi])
def test_a_theme_of_16_colors_names_nothing_else(name: str) -> None:
    theme = next(theme for theme in SHIPPED if theme.name == name)
    colors = [getattr(theme, part) for part in (*TEXT, *GROUNDS)]
    colors += [value for key, value in theme.variables.items() if not key.endswith("-style")]
    assert all(color.startswith("ansi_") for color in colors)


def test_the_users_theme_replaces_a_shipped_one_of_its_name() -> None:
    _write("harbour", MINE.format(name="harbour", foreground="#eeeeee"))
    themes, problems = load_themes()
    assert not problems
    assert [theme.foreground for theme in themes if theme.name == "harbour"] == ["#eeeeee"]


@pytest.mark.parametrize(
    "content",
    [
        "name = ",
        'name = "half"\ndark = true\n',
        MINE.format(name="bad", foreground="white"),
        MINE.format(name="bad", foreground="ansi_mauve"),
        MINE.format(name="Not A Name", foreground="#eeeeee"),
        MINE.format(name="bad", foreground="#eeeeee") + 'colour = "#ffffff"\n',
        MINE.format(name="bad", foreground="#eeeeee") + '[variables]\nborder = "#12"\n',
    ],
)
def test_a_broken_theme_is_reported_and_the_others_load(content: str) -> None:
    path = _write("bad", content)
    themes, problems = load_themes()
    assert [theme.name for theme in themes] == [theme.name for theme in SHIPPED]
    assert len(problems) == 1
    assert str(path) in problems[0].what


async def test_an_edited_theme_applies_at_once_and_errors_are_named(
    private_home: Path,
) -> None:
    _write("mine", MINE.format(name="mine", foreground="#eeeeee"))
    app = open_on("memory", theme="mine")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "The recipe has no model")
        _write("mine", MINE.format(name="mine", foreground="#abcdef"))
        await wait_until(pilot, lambda: str(app.screen.rich_style).startswith("#abcdef"))
        _write("mine", "name = ")
        await wait_for_text(pilot, "Theme not loaded")
        assert app.theme == "mine"


async def test_the_configured_theme_is_applied_once_it_is_fixed(private_home: Path) -> None:
    _write("mine", "name = ")
    app = open_on("memory", theme="mine")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "Theme 'mine' does not exist")
        _write("mine", MINE.format(name="mine", foreground="#abcdef"))
        await wait_until(pilot, lambda: app.theme == "mine")


def _write(name: str, content: str) -> Path:
    path = paths.user_themes_dir() / f"{name}.toml"
    path.write_text(content)
    return path


XTERM_LEVELS = (0x00, 0x5F, 0x87, 0xAF, 0xD7, 0xFF)
XTERM_GRAYS = tuple(range(0x08, 0xEF, 10))


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
