"""The command palette: every command of the screen in front and of the app."""

from __future__ import annotations

from functools import partial
from typing import cast

from textual.command import DiscoveryHit, Hit, Hits, Provider

from qlora_tui.tui.commands import EVERYWHERE, Command
from qlora_tui.tui.screens.base import WorkScreen


class CommandProvider(Provider):
    """Runs the same actions as the keys."""

    async def discover(self) -> Hits:
        for command in self._commands():
            yield DiscoveryHit(_title(command), partial(self._run, command), help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in self._commands():
            title = _title(command)
            score = max(matcher.match(title), matcher.match(command.help))
            if score > 0:
                yield Hit(score, matcher.highlight(title), partial(self._run, command), help=command.help)

    def _commands(self) -> tuple[Command, ...]:
        here = self.screen.ACTIONS if isinstance(self.screen, WorkScreen) else ()
        return (*here, *EVERYWHERE)

    async def _run(self, command: Command) -> None:
        await self.app.run_action(command.action, default_namespace=cast("WorkScreen", self.screen))


def _title(command: Command) -> str:
    return f"{command.label} ({command.key.split(',')[0]})"
