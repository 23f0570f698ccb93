"""Themes from TOML files, both built-in and in the user's folder.

A theme file has ``name``, ``dark`` and the colors of a Textual theme (``primary``, ``background``…);
``accent`` is the color of keys. The file may also set the four hues (``HUES``), ``variables`` of the app's
style sheets (``app.tcss``), and ``ansi = true`` to use the terminal's 16 colors. A file with an error is
reported and skipped. ``terminal`` is a theme without a file: it is derived from the terminal's own colors
once the terminal has reported them (``color_query``).
"""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from textual.app import App
from textual.color import Color, ColorParseError
from textual.theme import Theme

from qlora_tui import paths
from qlora_tui.errors import UserError

MUTED_SHARE = 0.7
"""Color of muted text, as a position between the background (0) and the foreground (1)."""
BORDER_SHARE = 0.3
"""Color of an unfocused panel's border, as a position between the background (0) and the foreground (1)."""
SCROLLBAR_SHARE = 0.55
"""Color of a scroll bar's handle, as a position between the background (0) and the foreground (1)."""
SELECTION_SHARE = 0.35
"""Color behind selected text, as a position between the theme's background (0) and its primary color (1)."""
CHART_FILL_SHARE = 0.14
"""Color of the area under a curve, as a position between the panel's surface (0) and the color of training
(1).
"""
AUTO, TERMINAL = "auto", "terminal"
"""Special values of the setting ``theme``: ``auto`` selects a theme by the terminal's number of colors, and
``terminal`` selects the theme that is derived from the terminal's own colors.
"""
DEFAULT = "harbour"
MIN_CONTRAST = 4.5
"""Minimum contrast of text with its background (WCAG 2.1, 1.4.3)."""
_STEPS = {
    "surface": 0.05,
    "panel": 0.1,
    "block-cursor-blurred-background": 0.1,
    "block-cursor-background": 0.16,
}
"""Colors of the backgrounds in the theme ``terminal``, as positions between the terminal's background (0) and
foreground (1).
"""
HUES = ("training", "validation", "forgetting", "hardware")
_OTHER_HUES = {
    (256, True): ("#d787d7", "#5fd7d7"),
    (256, False): ("#af005f", "#005f5f"),
    (16, True): ("ansi_bright_magenta", "ansi_cyan"),
    (16, False): ("ansi_magenta", "ansi_cyan"),
}
"""Default colors of the two hues ``forgetting`` and ``hardware``, by a theme's number of colors and whether
the theme is dark.
"""
ThemeColor = Annotated[str, Meta(pattern=r"^(#[0-9a-fA-F]{6}|ansi_[a-z_]+)$")]
_NOT_A_COLOR = re.compile(r"Expected `str` matching regex '\^\(#.*' - at `\$\.(\w+)`")
"""Matches msgspec's message for a value that is not a color."""


class ThemeFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of ``themes/<name>.toml``."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9-]+$")]
    dark: bool
    primary: ThemeColor
    secondary: ThemeColor
    warning: ThemeColor
    error: ThemeColor
    success: ThemeColor
    accent: ThemeColor
    foreground: ThemeColor
    background: ThemeColor
    surface: ThemeColor
    panel: ThemeColor
    training: ThemeColor | None = None
    """Color of training; ``primary`` if None."""
    validation: ThemeColor | None = None
    """Color of validation; ``success`` if None."""
    forgetting: ThemeColor | None = None
    hardware: ThemeColor | None = None
    ansi: bool = False
    variables: dict[str, str] = {}

    def theme(self) -> Theme:
        """Convert to a Textual theme, with the variables that the app's widgets need."""
        needed = _sixteen_colors(self) if self.ansi else _blended(self)
        parts = {name: getattr(self, name) for name in self.__struct_fields__ if name not in HUES}
        return Theme(**{**parts, "variables": {**_roles(self), **needed, **self.variables}})


def lacks_shades(app: App[Any]) -> bool:
    """Return whether the app shows at most 16 colors, which have no lighter or darker shades."""
    return app.no_color or app.current_theme.ansi


def _roles(file: ThemeFile) -> dict[str, str]:
    """Return the colors of the four hues and of keys, by role."""
    others = _OTHER_HUES[16 if file.ansi else 256, file.dark]
    return {
        "key": file.accent,
        "training": file.training or file.primary,
        "validation": file.validation or file.success,
        "forgetting": file.forgetting or others[0],
        "hardware": file.hardware or others[1],
    }


def _blended(file: ThemeFile) -> dict[str, str]:
    """Return replacements for some of Textual's variables. Some default colors are too faint to read. In
    others, such as ``auto 60%``, the percentage has no effect if they style only a part of a line.
    """
    background, surface, foreground, primary, training = map(
        Color.parse,
        (file.background, file.surface, file.foreground, file.primary, file.training or file.primary),
    )
    muted = file.variables.get("text-muted", background.blend(foreground, MUTED_SHARE).hex6)
    return {
        "text-muted": muted,
        # Textual shows the placeholder of an empty field in this color, so it must be readable.
        "text-disabled": muted,
        "border-blurred": background.blend(foreground, BORDER_SHARE).hex6,
        **_scrollbar(background.blend(foreground, SCROLLBAR_SHARE).hex6, surface.hex6),
        "input-selection-background": background.blend(primary, SELECTION_SHARE).hex6,
        "chart-fill": surface.blend(training, CHART_FILL_SHARE).hex6,
    }


def _scrollbar(thumb: str, track: str) -> dict[str, str]:
    moments = ("", "-hover", "-active")
    thumbs, tracks = ([f"scrollbar{part}{moment}" for moment in moments] for part in ("", "-background"))
    return dict.fromkeys(thumbs, thumb) | dict.fromkeys((*tracks, "scrollbar-corner-color"), track)


def _sixteen_colors(file: ThemeFile) -> dict[str, str]:
    foreground, background = ("ansi_white", "ansi_black") if file.dark else ("ansi_black", "ansi_white")
    muted = "ansi_white" if file.dark else "ansi_bright_black"
    return {
        "ansi-foreground": foreground,
        "ansi-background": background,
        "chart-fill": "ansi_default",
        "text-muted": muted,
        "text-disabled": muted,
        "border": file.primary,
        **_scrollbar("ansi_bright_black", "ansi_default"),
        # The terminal swaps text color and background here, so text of any color keeps its contrast.
        "block-cursor-foreground": "ansi_default",
        "block-cursor-background": "ansi_default",
        "block-cursor-text-style": "reverse",
    }


def contrast(a: Color, b: Color) -> float:
    """Return the contrast ratio of two colors, 1 to 21 (WCAG 2.1, "contrast ratio")."""
    lighter, darker = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: Color) -> float:
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(part) for part in color.normalized)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def of_terminal(foreground: Color, background: Color) -> Theme:
    """Return the theme ``terminal`` for a terminal with these colors. Text in the theme's colors is readable
    on the terminal's background.
    """
    white, black = Color(255, 255, 255), Color(0, 0, 0)
    dark = contrast(background, white) > contrast(background, black)
    far = white if dark else black
    ground = {name: background.blend(foreground, share) for name, share in _STEPS.items()}
    # If the terminal's background is a middle gray, no color would be readable on surfaces that are shifted
    # toward the text color.
    grounds = [background, *ground.values()]
    if min(contrast(far, each) for each in grounds) < MIN_CONTRAST:
        ground, grounds = dict.fromkeys(_STEPS, background), [background]

    def readable(color: Color) -> str:
        shades = (color.blend(far, share / 10) for share in range(11))
        return next((c for c in shades if min(contrast(c, g) for g in grounds) >= MIN_CONTRAST), far).hex6

    model = _file(paths.shipped_dir("themes") / f"{DEFAULT if dark else 'paper'}.toml")
    inks = ("primary", "secondary", "warning", "error", "success", "accent", *HUES)
    text, muted = readable(foreground), readable(background.blend(foreground, MUTED_SHARE))
    return msgspec.structs.replace(
        model,
        name=TERMINAL,
        background=background.hex6,
        foreground=text,
        surface=ground.pop("surface").hex6,
        panel=ground.pop("panel").hex6,
        variables={
            "text-muted": muted,
            "text-disabled": muted,
            "scrollbar": muted,
            "input-selection-background": ground["block-cursor-background"].hex6,
            "block-cursor-foreground": far.hex6,
            "block-cursor-blurred-foreground": text,
            **{name: color.hex6 for name, color in ground.items()},
        },
        **{name: readable(Color.parse(getattr(model, name))) for name in inks},
    ).theme()


def load_themes() -> tuple[list[Theme], list[UserError]]:
    """Return all themes that can be read, and an error for each theme file that cannot.

    A theme in the user's folder replaces a built-in theme of the same name.
    """
    themes: dict[str, Theme] = {}
    problems = []
    for folder in (paths.shipped_dir("themes"), paths.user_themes_dir()):
        for path in sorted(folder.glob("*.toml")):
            try:
                theme = _read(path)
                themes[theme.name] = theme
            except UserError as problem:
                problems.append(problem)
    return list(themes.values()), problems


def theme_names() -> list[str]:
    """Return the choices for the setting ``theme``: ``auto`` and the names of the app's and user's themes.

    Textual's own themes are left out, since their contrast is too low.
    """
    return [AUTO, *sorted((TERMINAL, *(theme.name for theme in load_themes()[0])))]


def user_theme_mtimes() -> tuple[tuple[str, int], ...]:
    """Return names and modification times of the user's theme files, to detect added, changed and removed
    files.
    """
    mtimes = []
    for path in sorted(paths.user_themes_dir().glob("*.toml")):
        with suppress(OSError):
            mtimes.append((path.name, path.stat().st_mtime_ns))
    return tuple(mtimes)


def _read(path: Path) -> Theme:
    try:
        return _file(path).theme()
    except (OSError, ValueError, RecursionError, ColorParseError, msgspec.ValidationError) as error:
        wrong = _NOT_A_COLOR.sub(r"\1 is not a color", str(error))
        raise UserError(
            "Theme not loaded",
            what=f"{path}: {wrong}.",
            fix="Compare the file with the shipped themes. Colors are #rrggbb, or names such as ansi_blue.",
        ) from error


def _file(path: Path) -> ThemeFile:
    file = msgspec.convert(tomllib.loads(path.read_text("utf-8")), ThemeFile)
    _check_colors(file)
    return file


def _check_colors(file: ThemeFile) -> None:
    """Raise ColorParseError if a value has the form of a color but is not a color. Textual would crash on
    such a value.
    """
    for name in file.__struct_fields__:
        value = getattr(file, name)
        if isinstance(value, str) and name != "name":
            Color.parse(value)
    for name, value in file.variables.items():
        if not name.endswith("-style"):
            Color.parse(value)


def is_of_terminal(setting: str, few_colors: bool) -> bool:
    """Return whether the terminal's own colors are used. They are used if the setting is ``terminal``, or if
    the setting is ``auto`` and the terminal has at most 16 colors.
    """
    return setting == TERMINAL or (setting == AUTO and few_colors)


def choose(setting: str, *, few_colors: bool, is_light: bool, knows_terminal: bool) -> str:
    """Return the name of the theme to show.

    Args:
        setting: The user's ``theme`` setting.
        few_colors: Whether the terminal has at most 16 colors.
        is_light: Whether the terminal's background is light; False if unknown.
        knows_terminal: Whether the theme :data:`TERMINAL` is available, because the terminal has reported its
            colors.
    """
    if not is_of_terminal(setting, few_colors):
        return DEFAULT if setting == AUTO else setting
    if knows_terminal:
        return TERMINAL
    return "terminal-light" if is_light else "terminal-dark"
