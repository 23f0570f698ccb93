"""Style sheets that are read once a theme.

Textual reads every sheet of the app again whenever a screen brings one of its own, while its first key waits.
"""

from __future__ import annotations

from textual.cache import LRUCache
from textual.css.stylesheet import Stylesheet

_SHEETS = 1024
"""More than there are: Textual remembers the last 64 it read, in an order that finds none of more than 64."""


class CachedStylesheet(Stylesheet):
    """What was read stays read until a colour changes."""

    def __init__(self, *, variables: dict[str, str] | None = None) -> None:
        super().__init__(variables=variables)
        self._parse_cache = LRUCache(_SHEETS)

    def set_variables(self, variables: dict[str, str]) -> None:
        if variables != self._variables:
            super().set_variables(variables)

    def reparse(self) -> None:
        self.parse()
