"""Selects the app's theme for this terminal, previews themes, and reloads edited theme files."""

from __future__ import annotations

from typing import Any

from rich.color import Color as RichColor
from rich.segment import Segment, Segments
from rich.style import Style
from textual.app import App
from textual.color import Color
from textual.command import CommandPalette
from textual.scrollbar import ScrollBar, ScrollBarRender

from qlora_tui.settings import Settings
from qlora_tui.tui import themes
from qlora_tui.tui.color_query import TerminalColor, is_light_by_environment
from qlora_tui.tui.command_palette import previewed_theme
from qlora_tui.tui.line_filters import TWO_COLORS
from qlora_tui.tui.terminal_app import TerminalApp

_HALF = 0.5
_LINE = "│"
_TRACK = Style(color=RichColor.parse("bright_black"))
"""Style of the line that shows the track of a scroll bar. Without color, bright black is shown as dim."""


class LineTrack(ScrollBarRender):
    """Draws the track of a vertical scroll bar as a line if the track has the terminal's own background, on
    which it would be invisible.
    """

    @classmethod
    def render_bar(cls, *args: Any, **options: Any) -> Segments:
        bar = super().render_bar(*args, **options)
        if options["vertical"] and options["back_color"].is_default:
            bar.segments = [_with_line(*segment) for segment in bar.segments]
        return bar


def _with_line(text: str, style: Style | None, control: Any) -> Segment:
    """Return a segment of a scroll bar. If the segment is a part of the track, draw the line in it."""
    is_thumb = text.strip() or (style is not None and style.reverse)
    return (
        Segment(text, style, control) if is_thumb else Segment(_LINE * len(text), (style or Style()) + _TRACK)
    )


ScrollBar.renderer = LineTrack


class ThemedApp(TerminalApp):
    """An app that uses the theme that the settings select, or a simpler theme if the terminal requires it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self._loaded_mtimes: tuple[tuple[str, int], ...] = ()
        self._file_problems: list[str] = []
        self._terminal_colors: dict[bool, Color] = {}
        """The colors that the terminal has reported: its text color under False, its background color under
        True.
        """
        self._is_light = is_light_by_environment()

    def show_first_theme(self) -> None:
        """Load the themes, and show the one in the settings, or the default if it does not exist.

        Call this before the first screen is mounted. If the first theme is set later, Textual parses all
        style sheets again and paints the key hints twice.
        """
        self._load()
        # Textual's default theme lacks variables that the app's style sheets use.
        self.theme = self._wanted_theme if self._wanted_theme in self.available_themes else themes.DEFAULT

    def show_wanted_theme(self) -> None:
        """Switch to the theme that is set in the user's settings. Called after the settings have changed."""
        self._show_theme(self._wanted_theme)
        if self.wants_terminal_colors() and not self._terminal_colors:
            self.ask_terminal_colors()

    @property
    def theme_problems(self) -> list[str]:
        """What is wrong with the theme files and the theme setting, in sentences."""
        if self._wanted_theme in self.available_themes:
            return [*self._file_problems]
        return [*self._file_problems, f"Theme {self.settings.theme!r} does not exist."]

    def reload_themes(self) -> list[str]:
        """If a theme file has changed, load the themes again; return what is wrong with the files."""
        if themes.user_theme_mtimes() == self._loaded_mtimes:
            return []
        had_theme = self._wanted_theme in self.available_themes
        self._load()
        if not had_theme and self._wanted_theme in self.available_themes:
            self.theme = self._wanted_theme
        else:
            # The file of the current theme may have been edited, so paint again with its colors.
            self.mutate_reactive(App.theme)
        return self._file_problems

    @property
    def _wanted_theme(self) -> str:
        return self._theme_for(self.settings.theme)

    def _theme_for(self, setting: str) -> str:
        """Return the name of the theme to show in this terminal for a value of the setting ``theme``."""
        if self.no_color:
            return TWO_COLORS.name
        return themes.choose(
            setting,
            few_colors=self._has_few_colors,
            is_light=self._is_light,
            knows_terminal=themes.TERMINAL in self.available_themes,
        )

    def wants_terminal_colors(self) -> bool:
        return not self.no_color and themes.is_of_terminal(self.settings.theme, self._has_few_colors)

    @property
    def _has_few_colors(self) -> bool:
        return self.console.color_system in (None, "standard")

    def on_terminal_color(self, message: TerminalColor) -> None:
        """Record a color that the terminal has reported, and update the theme. Once both the foreground and
        the background color of a terminal with 24-bit color are known, the theme that is derived from them
        becomes available.
        """
        self._terminal_colors[message.is_background] = message.color
        if message.is_background:
            self._is_light = message.color.brightness > _HALF
        # With 256 colors, the theme's background would only be similar to the terminal's, and the difference
        # would be visible.
        if len(self._terminal_colors) == 2 and self.console.color_system == "truecolor":
            foreground, background = self._terminal_colors[False], self._terminal_colors[True]
            self.register_theme(themes.of_terminal(foreground, background))
        self._show_theme(self._wanted_theme)

    def _show_theme(self, name: str) -> None:
        """Switch to the theme with this name. Do nothing if there is no such theme, such as when its file
        could not be read.
        """
        if name in self.available_themes:
            self.theme = name

    def _load(self) -> None:
        """Register all themes from their files. A file with an error is skipped; its error is stored and
        reported later.
        """
        self._loaded_mtimes = themes.user_theme_mtimes()
        loaded, problems = themes.load_themes()
        for theme in (*loaded, TWO_COLORS):
            self.register_theme(theme)
        self._file_problems = [str(problem) for problem in problems]

    def watch_theme(self) -> None:
        """Draw panels as tinted surfaces if the theme has enough colors for them."""
        few = themes.lacks_shades(self) or self._has_few_colors
        self.set_class(not few, "-surfaces", update=False)

    def preview_theme(self, setting: str) -> None:
        """Show the theme for a value of the setting ``theme`` without saving the setting. If ``setting`` is
        empty, show the theme of the saved setting again.
        """
        self._show_theme(self._theme_for(setting or self.settings.theme))

    def on_command_palette_option_highlighted(self, message: CommandPalette.OptionHighlighted) -> None:
        """If the highlighted entry of the palette selects a theme, preview this theme; otherwise, switch back
        to the theme that the settings select.
        """
        self.preview_theme(previewed_theme(message))

    def on_command_palette_closed(self, message: CommandPalette.Closed) -> None:
        """Switch back to the theme in the settings if the palette was closed without selecting an entry."""
        if not message.option_selected:
            self.preview_theme("")
