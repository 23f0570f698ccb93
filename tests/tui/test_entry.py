"""Keys that arrive together, as over a slow link."""

from __future__ import annotations

from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.widgets.controls import TextField
from tests.tui.screen_assertions import wait_until


class Entries(App[None]):
    sent: str | None = None

    def compose(self) -> ComposeResult:
        yield TextField(id="line")
        yield PromptBox("ask", id="prompt")

    def on_input_submitted(self, event: TextField.Submitted) -> None:
        self.sent = event.value

    def on_prompt_box_sent(self, event: PromptBox.Sent) -> None:
        self.sent = event.text


def arrive(pilot: Pilot[None], *keys: str) -> None:
    for key in keys:
        pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))


async def test_no_cursor_blinks() -> None:
    app = Entries()
    async with app.run_test():
        assert not app.query_one(TextField).cursor_blink
        assert not app.query_one(PromptBox).cursor_blink


async def test_keys_that_arrive_together_act_in_their_order() -> None:
    app = Entries()
    async with app.run_test() as pilot:
        for name in ("line", "prompt"):
            app.sent = None
            app.query_one(f"#{name}").focus()
            await pilot.pause()
            arrive(pilot, *"abc", "backspace", "backspace", *"78", "left", "9", "enter")
            await wait_until(pilot, lambda: app.sent is not None)
            assert app.sent == "a798"
