from __future__ import annotations

from pathlib import Path

import pytest
from textual.color import Color

from qlora_tui import paths
from qlora_tui.settings import Settings
from qlora_tui.tui.themes import load_themes
from tests.tui.contrast import MIN_CONTRAST, contrast
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_on

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


async def test_the_app_opens_with_a_broken_theme_and_reports_it() -> None:
    _write("bad", "name = ")
    async with open_on("memory").run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "Theme not loaded")


async def test_a_users_theme_without_variables_works(private_home: Path) -> None:
    _write("mine", MINE.format(name="mine", foreground="#eeeeee"))
    app = open_on("memory", theme="mine")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "The recipe has no model")
        assert app.theme == "mine"


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
