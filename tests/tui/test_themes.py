"""Themes: everything is legible in every state, and a broken file disables nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from textual.color import Color
from textual.command import CommandList
from textual.content import Content
from textual.theme import Theme

from qlora_tui import paths
from qlora_tui.chat.chat_types import ADAPTER
from qlora_tui.tui.themes import DEFAULT, HUES, MIN_CONTRAST, contrast, load_themes, of_terminal
from qlora_tui.tui.widgets.controls import ViList
from tests.tui.chat_screen import finished
from tests.tui.screen_assertions import segments_in_front, segments_of, wait_for_text, wait_until
from tests.tui.workstation import open_on

MIN_GRAPHIC = 3.0
"""For what is drawn, WCAG 2.1, 1.4.11."""


def illegible(app: Any) -> set[str]:
    """Words with low contrast to their background. What is drawn, bars and lines, is not looked at."""
    return {
        f"{one.text.strip()!r} {ratio:.2f}"
        for line in segments_in_front(app)
        for one in line
        if any(character.isalnum() for character in one.text)
        for ratio in _contrast_of(_seen(one.style))
        if ratio < MIN_CONTRAST
    }


def colors_of(app: Any) -> set[str]:
    """Of what kinds the colors are: default, standard, eight_bit, truecolor; none where there are none."""
    styles = [_seen(one.style) for line in segments_of(app) for one in line]
    return {color.type.name.lower() for style in styles for color in (style.color, style.bgcolor) if color}


def _contrast_of(style: Style) -> Iterator[float]:
    colors = style.bgcolor, style.color
    # The default colors of a terminal are legible; its 16 colors are about what xterm shows.
    if all(color is not None and not color.is_default for color in colors):
        yield contrast(*(Color(*color.get_truecolor(DEFAULT_TERMINAL_THEME)) for color in colors if color))


def _seen(style: Style | None) -> Style:
    """Without what a click runs."""
    return Style() if style is None else style.clear_meta_and_links()


INKS = (
    *("foreground", "text-muted", "text-disabled", "key", "primary", "secondary"),
    *("success", "warning", "error", "training", "validation", "forgetting", "hardware"),
)
"""Variables of text, on every screen and in every state."""
GROUNDS = ("background", "surface", "panel", "block-cursor-background", "block-cursor-blurred-background")
"""Variables of what is behind text: screen, panels, first and last line, the row of a cursor."""
PAIRS = [
    *((ink, ground, MIN_CONTRAST) for ink in INKS for ground in GROUNDS),
    *(
        (f"{each}-foreground", f"{each}-background", MIN_CONTRAST)
        for each in ("block-cursor", "block-cursor-blurred")
    ),
    ("foreground", "input-selection-background", MIN_CONTRAST),
    *(("border", ground, MIN_GRAPHIC) for ground in GROUNDS[:2]),
    ("scrollbar", "scrollbar-background", MIN_GRAPHIC),
    *((hue, "chart-fill", MIN_GRAPHIC) for hue in ("training", "validation")),
]
OF_TERMINALS = {
    "solarized dark": ("#839496", "#002b36"),
    "solarized light": ("#657b83", "#fdf6e3"),
    "black": ("#ffffff", "#000000"),
    "white": ("#000000", "#ffffff"),
    "gray": ("#ffffff", "#808080"),
    "faint": ("#444444", "#333333"),
}
"""Text and background of some terminals, of which a theme is made."""
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
    assert DEFAULT in names
    assert len(names) >= 4
    assert sum(theme.ansi for theme in SHIPPED) >= 2
    assert {theme.dark for theme in SHIPPED} == {True, False}


def _themes() -> dict[str, Theme]:
    made = {name: of_terminal(*map(Color.parse, colors)) for name, colors in OF_TERMINALS.items()}
    return {theme.name: theme for theme in SHIPPED if not theme.ansi} | made


@pytest.mark.parametrize("name", _themes())
def test_everything_is_legible_on_every_ground(name: str) -> None:
    theme = _themes()[name]
    variables = theme.to_color_system().generate() | theme.variables
    low = {
        f"{ink} on {ground}": round(ratio, 2)
        for ink, ground, least in PAIRS
        if (ratio := contrast(Color.parse(variables[ink]), Color.parse(variables[ground]))) < least
    }
    assert not low


@pytest.mark.parametrize(
    ("color", "on_white"), [("#000000", 21.0), ("#767676", 4.54), ("#ff0000", 4.0), ("#0000ff", 8.59)]
)
def test_contrast_is_that_of_wcag(color: str, on_white: float) -> None:
    white = Color.parse("white")
    assert contrast(Color.parse(color), white) == pytest.approx(on_white, abs=0.005)
    assert contrast(white, Color.parse(color)) == pytest.approx(on_white, abs=0.005)


@pytest.mark.parametrize("name", [theme.name for theme in SHIPPED if not theme.ansi])
def test_hues_keys_and_warnings_differ(name: str) -> None:
    variables = _themes()[name].variables
    colors = [
        *(variables[hue] for hue in HUES),
        variables["key"],
        _themes()[name].warning,
        _themes()[name].error,
    ]
    assert len(set(colors)) == len(colors)


@pytest.mark.parametrize("name", [theme.name for theme in SHIPPED if theme.ansi])
def test_a_theme_of_16_colors_names_nothing_else(name: str) -> None:
    theme = next(theme for theme in SHIPPED if theme.name == name)
    colors = [getattr(theme, part) for part in ("primary", "secondary", "success", "warning", "error")]
    colors += [value for key, value in theme.variables.items() if not key.endswith("-style")]
    assert all(color.startswith("ansi_") for color in colors)
    # The terminal's own text is legible on its own background, reversed too, and nothing else is known to be.
    variables = theme.to_color_system().generate() | theme.variables
    for ground in ("background", "block-cursor-background", "block-cursor-blurred-background"):
        assert variables[ground] == "ansi_default"
    assert variables["block-cursor-text-style"] == "reverse"


async def test_16_colors_show_the_field_of_chat_and_its_cursor() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        app.theme = "terminal-dark"
        await wait_for_text(pilot, "Type a message")
        await pilot.press("i")
        await wait_for_text(pilot, "Enter sends")
        line = next(line for line in segments_of(app) if "ype a message" in "".join(one.text for one in line))
        cursor, rest = (
            next(one.style for one in line if one.text == text) for text in ("T", "ype a message")
        )
        assert cursor is not None and cursor.reverse and rest is not None and rest.underline
        assert {color.name for color in (cursor.color, cursor.bgcolor) if color} <= {"default"}


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


@pytest.mark.parametrize("no_color", [False, True])
async def test_the_cursor_of_a_list_is_reversed_where_colors_are_few(
    monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    app = open_on("models", theme="terminal-dark")
    async with app.run_test(size=(80, 24)) as pilot:
        # The screen fills its list itself when it has read the models.
        await wait_for_text(pilot, "Good first models")
        lines = app.screen.query_one(ViList)
        lines.show([(name, Content.styled(name, "dim red")) for name in ("here", "below")])
        lines.focus()
        lines.highlighted = 0
        await pilot.pause()
        here, below = (
            [segment.style or Style() for segment in lines.render_line(y) if segment.text] for y in range(2)
        )
        assert not any(style.reverse for style in below)
        assert all(style.reverse for style in here)
        # Reversed, the color of a text would be the background of a part of the row.
        assert {(style.color, style.bgcolor, style.dim) for style in here} == {(None, None, None)}
        await pilot.press("ctrl+p")
        await wait_for_text(pilot, "Filter the models by name")
        await pilot.press("down")
        commands = app.screen.query_one(CommandList)

        def reversed_rows() -> list[bool]:
            rows = [[style for text, style, _ in commands.render_line(y) if text] for y in range(3)]
            return [all(style and style.reverse for style in row) for row in rows]

        await wait_until(pilot, lambda: reversed_rows() == [False, True, False])
