"""Keys named in texts are those of the user's keymap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from textual.binding import Binding, BindingType

from qlora_tui.tui.key_names import dialog_keys, key_names, key_while_typing
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import open_on

TUI = Path(__file__).parents[2] / "qlora_tui/tui"
_COMMAND = re.compile(r"\{([a-z]+\.[a-z_]+)\}")
_LOOKUPS = {"key_name", "key_names", "bare_key", "key_while_typing"}
in_one_worker = pytest.mark.xdist_group("texts of the app")
"""To read all modules once."""
_KEY = re.compile(r"\[[A-Za-z0-9?/'+:-]\]|\bF\d{1,2}\b|\bCtrl\+\w")
_FIXED = {
    "train/screen.py": ("[h]", "[l]", "[']"),
    "chat/text.py": ("Ctrl+J",),
    "lora/module_grid.py": ("[x]", "[-]"),
    "runs/export_choices.py": ("F16", "[r]", "[D]"),
}
"""Keys of dialogs, fields and lists, which a keymap cannot change; check boxes; a type of GGUF file."""


def test_a_command_with_several_keys_can_name_all_of_them() -> None:
    assert key_names("chat.unfold") == "[z] or Ctrl+O"
    assert key_while_typing("chat.unfold") == "Ctrl+O"


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
