"""Keys named in texts are those of the user's keymap."""

from __future__ import annotations

from textual.binding import Binding, BindingType

from qlora_tui.tui.key_names import dialog_keys
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import open_on


def test_a_dialogs_line_of_keys_follows_its_bindings() -> None:
    bindings: list[BindingType] = [
        Binding("ctrl+s,s", "apply", "Apply"),
        ("j", "down"),
        Binding("escape", "dismiss", "Close"),
    ]
    assert dialog_keys(bindings, "Tab next").plain == "Tab next · Ctrl+S apply · Esc close"


async def test_texts_name_the_keys_of_the_users_keymap() -> None:
    keymap = {"go.train": "f7", "models.filter": "ctrl+f", "app.undo": "z", "memory.apply": "f2"}
    app = open_on("runs", keymap=keymap)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "No runs yet. Press F7 to launch one.")
        await app.action_go("models")
        await wait_for_text(pilot, "Ctrl+F type a name", "[z] Undo", "F7 Train")
        await app.action_go("memory")
        await pilot.press("question_mark")
        await wait_for_text(pilot, "recipe does not fit, F2", "applies")
