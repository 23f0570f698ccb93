"""Keys named in texts are those of the user's keymap."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from textual.binding import Binding, BindingType

from qlora_tui.tui.commands import COMMANDS
from qlora_tui.tui.key_names import bare_key, dialog_keys, key_name, key_names, key_while_typing, name_keys
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


@cache
def texts_of(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The strings of a module without its docstrings, and the ids in its calls for a key."""
    texts: set[str] = set()
    ids: set[str] = set()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):  # a statement comes before what it consists of
        if isinstance(node, ast.Expr):
            docstrings.add(id(node.value))
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in docstrings:
                texts.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _LOOKUPS:
            ids.update(str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))
    return frozenset(texts), frozenset(ids)


def commands_named_in(path: Path) -> Iterator[str]:
    """Ids in the texts of a module, and in its calls for a key."""
    texts, ids = texts_of(path)
    for text in texts:
        yield from _COMMAND.findall(text)
    yield from ids


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("app.undo", "[u]"),
        ("models.filter", "[/]"),
        ("runs.delete", "[D]"),
        ("app.palette", "Ctrl+P"),
        ("app.keys", "F1"),
        ("chat.stop", "Esc"),
        ("lora.toggle", "Space"),
        ("memory.previous", "Shift+Tab"),
    ],
)
def test_only_single_characters_are_in_brackets(command: str, shown: str) -> None:
    assert key_name(command) == shown
    assert bare_key(command) == shown.strip("[]")
    assert name_keys(f"Press {{{command}}}.") == f"Press {shown}."


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


@in_one_worker
def test_every_command_that_a_text_names_exists() -> None:
    named = {name for path in TUI.rglob("*.py") for name in commands_named_in(path)}
    assert len(named) > 30
    assert named - set(COMMANDS) == set()


@in_one_worker
def test_no_text_has_a_key_that_a_keymap_can_change() -> None:
    written = [
        f"{path.relative_to(TUI)}: {key} in {text!r}"
        for path in TUI.rglob("*.py")
        for text in texts_of(path)[0]
        for key in _KEY.findall(text)
        if not any(str(path).endswith(name) and key in keys for name, keys in _FIXED.items())
        and path.name != "key_names.py"
    ]
    assert not written, "name the command with key_name() or name_keys()"


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
