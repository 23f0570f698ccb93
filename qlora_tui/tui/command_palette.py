"""The command palette: every command of the screen in front, of the app, and of the other screens.

A command of another screen acts on what is selected there, so the palette only opens that screen.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.fuzzy import Matcher
from textual.markup import escape

from qlora_tui.tui.commands import EVERYWHERE, SCREENS, Command, screen_commands
from qlora_tui.tui.key_names import bare_key
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.themes import theme_names

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_OTHER_SCREEN_FACTOR = 0.8
"""Factor on the score of commands of other screens, which are listed after those of the current one."""

_HELP_SCORE = 0.3
"""Score of a command whose title does not match, where its help has words that begin like the query's."""

_THEME_HELP = "Use this theme, now and at every start."


class CommandProvider(Provider):
    """Runs the same actions as the keys."""

    async def discover(self) -> Hits:
        for command in self._commands():
            yield DiscoveryHit(self._title(command), partial(self._run, command), help=escape(command.help))

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in self._commands():
            title = self._title(command)
            if (score := _score(matcher, query, title, command)) > 0:
                yield Hit(
                    score, matcher.highlight(title), partial(self._run, command), help=escape(command.help)
                )
        for name in await asyncio.to_thread(theme_names):
            title = f"Theme: {name}"
            if (score := matcher.match(title)) > 0:
                yield Hit(score, matcher.highlight(title), partial(self._use_theme, name), help=_THEME_HELP)
        mode = self.screen.MODE if isinstance(self.screen, WorkScreen) else ""
        others = ((entry, command) for entry in SCREENS for command in screen_commands(entry.name))
        for entry, command in others:
            title = self._title(command, f" on {entry.label}")
            score = _OTHER_SCREEN_FACTOR * _score(matcher, query, title, command)
            if entry.name != mode and score > 0:
                opening, help_ = entry.opened_by, f"Opens {entry.label}. {command.help}"
                yield Hit(score, matcher.highlight(title), partial(self._run, opening), help=escape(help_))

    def _commands(self) -> tuple[Command, ...]:
        here = self.screen.SCREEN_COMMANDS if isinstance(self.screen, WorkScreen) else ()
        return (*here, *EVERYWHERE)

    async def _run(self, command: Command) -> None:
        await self.app.run_action(command.action, default_namespace=cast("WorkScreen", self.screen))

    def _use_theme(self, name: str) -> None:
        from qlora_tui.settings import save_setting

        app = cast("QloraApp", self.app)
        app.try_or_show_error(lambda: app.apply_settings(save_setting("theme", name)))

    def _title(self, command: Command, where: str = "") -> str:
        return f"{command.label} ({bare_key(command.id)}{where})"


def _score(matcher: Matcher, query: str, title: str, command: Command) -> float:
    """How well a command matches: letters of its title, or whole beginnings of words in its help.

    Letters of the help, which has many, would match almost anything.
    """
    words = command.help.casefold().split()
    in_help = all(any(word.startswith(part) for word in words) for part in query.casefold().split())
    return matcher.match(title) or (_HELP_SCORE if in_help else 0.0)
