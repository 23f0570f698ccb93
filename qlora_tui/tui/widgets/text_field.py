"""Fields to write in that take their keys in the order they were pressed."""

from __future__ import annotations

from textual import events
from textual.widget import Widget
from textual.widgets import Input


class OwnKeysFirst:
    """Acts on the keys it has bindings for itself.

    Textual writes a letter at once but lets backspace and enter bubble up to the app and back as
    bindings. Keys that arrive together, as over a slow link, would overtake them: what was typed
    after a backspace would be deleted by it.
    """

    async def _on_key(self, event: events.Key) -> None:
        assert isinstance(self, Widget)
        for binding in self._bindings.key_to_bindings.get(event.key, ()):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return


class TextField(OwnKeysFirst, Input):
    """A line of text. Its cursor stands still: over a slow link nothing is sent while nothing changes."""

    def on_mount(self) -> None:
        self.cursor_blink = False
