"""Text fields that handle keys in the order they were pressed."""

from __future__ import annotations

from textual import events
from textual.widget import Widget
from textual.widgets import Input

from qlora_tui.tui.textual_compat import bindings_of_widget


class OwnKeysFirst:
    """Runs a field's own key bindings in the order of the keys.

    Textual inserts a letter at once, but lets backspace and enter bubble up to the app and back as bindings.
    Of keys that arrive together, as over a slow link, letters would overtake them: what was typed after a
    backspace would be deleted by it. https://github.com/Textualize/textual/issues/6605
    """

    async def on_key(self, event: events.Key) -> None:
        assert isinstance(self, Widget)
        for binding in bindings_of_widget(self, event.key):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return


class TextField(OwnKeysFirst, Input):
    """A line of text. Its cursor does not blink: nothing is sent over a slow link while nothing changes."""

    def on_mount(self) -> None:
        self.cursor_blink = False
