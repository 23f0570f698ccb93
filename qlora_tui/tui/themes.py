"""Themes from TOML files: shipped ones, and the user's folder.

A theme file has ``name``, ``dark``, the colors of a Textual theme (``primary``, ``background``…), of which
``accent`` is that of keys, optionally those of the four hues (``HUES``), and ``ansi = true`` to use the
terminal's 16 colors. A file with an error is reported and skipped.
"""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from textual.color import Color, ColorParseError
from textual.theme import Theme

from qlora_tui import paths
from qlora_tui.errors import UserError

MUTED_SHARE = 0.7
"""How far muted text is from the background, towards the foreground."""
BORDER_SHARE = 0.3
"""How far the border of a panel without the focus is from the background, towards the foreground."""
SELECTION_SHARE = 0.35
"""Mix of a field's selection between the background color (0) and the primary color (1)."""
CHART_FILL_SHARE = 0.14
"""Mix of the area under a curve between the surface of a panel (0) and the color of training (1)."""
HUES = ("training", "validation", "forgetting", "hardware")
_OTHER_HUES = {
    (256, True): ("#d787d7", "#5fd7d7"),
    (256, False): ("#af005f", "#005f5f"),
    (16, True): ("ansi_bright_magenta", "ansi_cyan"),
    (16, False): ("ansi_magenta", "ansi_cyan"),
}
"""Forgetting and hardware in a theme that does not name them, by its colors and whether it is dark."""
ThemeColor = Annotated[str, Meta(pattern=r"^(#[0-9a-fA-F]{6}|ansi_[a-z_]+)$")]
_NOT_A_COLOR = re.compile(r"Expected `str` matching regex '\^\(#.*' - at `\$\.(\w+)`")
"""msgspec's message for a value that is not a color."""


class ThemeFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``themes/<name>.toml``."""

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
    """By default ``primary``."""
    validation: ThemeColor | None = None
    """By default ``success``."""
    forgetting: ThemeColor | None = None
    hardware: ThemeColor | None = None
    ansi: bool = False
    variables: dict[str, str] = {}

    def theme(self) -> Theme:
        """Convert to a Textual theme, with the variables that its widgets need."""
        needed = _sixteen_colors(self) if self.ansi else _blended(self)
        parts = {name: getattr(self, name) for name in self.__struct_fields__ if name not in HUES}
        return Theme(**{**parts, "variables": {**_roles(self), **needed, **self.variables}})


def _roles(file: ThemeFile) -> dict[str, str]:
    """Colors by what they stand for: those of the hues and of keys."""
    others = _OTHER_HUES[16 if file.ansi else 256, file.dark]
    return {
        "key": file.accent,
        "training": file.training or file.primary,
        "validation": file.validation or file.success,
        "forgetting": file.forgetting or others[0],
        "hardware": file.hardware or others[1],
    }


def _blended(file: ThemeFile) -> dict[str, str]:
    """Variables that Textual makes too faint to read, or does not resolve inside a line (``auto 60%``)."""
    background, surface, foreground, primary, training = map(
        Color.parse,
        (file.background, file.surface, file.foreground, file.primary, file.training or file.primary),
    )
    muted = background.blend(foreground, MUTED_SHARE).hex6
    return {
        "text-muted": muted,
        # The hint in an empty field is there to be read.
        "text-disabled": muted,
        "border-blurred": background.blend(foreground, BORDER_SHARE).hex6,
        "input-selection-background": background.blend(primary, SELECTION_SHARE).hex6,
        "chart-fill": surface.blend(training, CHART_FILL_SHARE).hex6,
    }


def _sixteen_colors(file: ThemeFile) -> dict[str, str]:
    foreground, background = ("ansi_white", "ansi_black") if file.dark else ("ansi_black", "ansi_white")
    muted = "ansi_white" if file.dark else "ansi_bright_black"
    return {
        "ansi-foreground": foreground,
        "ansi-background": background,
        "chart-fill": background,
        "text-muted": muted,
        "text-disabled": muted,
        "border": file.primary,
    }


def load_themes() -> tuple[list[Theme], list[UserError]]:
    """Every theme that can be read (the user's replace shipped ones of the same name), and what was wrong."""
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
    """Names of the themes to choose from; Textual's own do not have the contrast that ours have."""
    return sorted(theme.name for theme in load_themes()[0])


def user_theme_mtimes() -> tuple[tuple[str, int], ...]:
    """Names and times of the user's theme files: differs when one has come, gone or changed."""
    mtimes = []
    for path in sorted(paths.user_themes_dir().glob("*.toml")):
        with suppress(OSError):
            mtimes.append((path.name, path.stat().st_mtime_ns))
    return tuple(mtimes)


def _read(path: Path) -> Theme:
    try:
        file = msgspec.convert(tomllib.loads(path.read_text("utf-8")), ThemeFile)
        _check_colors(file)
        return file.theme()
    except (OSError, ValueError, RecursionError, ColorParseError, msgspec.ValidationError) as error:
        wrong = _NOT_A_COLOR.sub(r"\1 is not a color", str(error))
        raise UserError(
            "Theme not loaded",
            what=f"{path}: {wrong}.",
            fix="Compare it with the shipped themes; colors are #rrggbb or ansi_blue.",
        ) from error


def _check_colors(file: ThemeFile) -> None:
    """Raise ColorParseError for a text that only looks like a color: Textual would stop the app."""
    for name in file.__struct_fields__:
        value = getattr(file, name)
        if isinstance(value, str) and name != "name":
            Color.parse(value)
    for name, value in file.variables.items():
        if not name.endswith("-style"):
            Color.parse(value)
