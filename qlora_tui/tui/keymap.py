"""Checks of the user's keymap."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from textual.keys import KEY_NAME_REPLACEMENTS, Keys

from qlora_tui.tui.commands import COMMANDS, SCREENS, commands_by_screen
from qlora_tui.tui.key_names import key_name

_MODIFIERS = frozenset(("ctrl", "shift", "alt", "meta", "super", "hyper"))
_KEY_NAMES = frozenset((*(key.value for key in Keys), *KEY_NAME_REPLACEMENTS.values()))


def validate_keymap(keymap: Mapping[str, str]) -> list[str]:
    """A sentence for each unknown command, each unknown key, and each key that two commands share."""
    problems = [_unknown_command(name) for name in keymap if name not in COMMANDS]
    for name, keys in keymap.items():
        problems += [_invalid_key(name, key) for key in keys.split(",") if not _is_key(key)]
    for key, (mine, other) in _shared_keys(keymap):
        both = f"config.toml: {mine} and {other} both have the key {key}."
        problems.append(f"{both} Give one of them another in [keymap].")
    return problems


def _shared_keys(keymap: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Keys that a command of the keymap shares with another command on the same screen."""
    everywhere, *screens = commands_by_screen()
    # In a modal, the app's own keys do nothing.
    without_app_keys = {"Everywhere", *(entry.label for entry in SCREENS if entry.is_modal)}
    for heading, commands in [everywhere, *screens]:
        offered = commands if heading in without_app_keys else (*commands, *everywhere[1])
        for mine in (command for command in commands if command.id in keymap):
            for other in offered:
                for key in {*mine.keys(keymap)} & {*other.keys(keymap)}:
                    # Some keys have two commands by default, of which one is offered at a time.
                    if other.id != mine.id and key not in mine.key.split(","):
                        yield key, (mine.id, other.id)


def _is_key(key: str) -> bool:
    """Whether Textual has a key of this name: ``q``, ``ctrl+o``, ``shift+tab``, ``slash``."""
    *modifiers, base = key.split("+")
    return _MODIFIERS.issuperset(modifiers) and (len(base) == 1 or base in _KEY_NAMES or _is_character(base))


def _is_character(name: str) -> bool:
    try:
        unicodedata.lookup(name.replace("_", " "))
    except KeyError:
        return False
    return name == name.lower()


def _unknown_command(name: str) -> str:
    near = get_close_matches(name, COMMANDS, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    listed = f"Press {key_name('app.keys')} to list all commands."
    return f"config.toml: {name} in [keymap] is not a command.{meant} {listed}"


def _invalid_key(name: str, key: str) -> str:
    written = key.strip().replace("^", "ctrl+")
    *modifiers, base = written.split("+")
    if not _is_key(written) and (near := get_close_matches(base, _KEY_NAMES, 1)):
        written = "+".join([*modifiers, near[0]])
    hint = f' Write "{written}".' if _is_key(written) else ""
    return f'config.toml: {name} in [keymap] has the key "{key}", which does not exist.{hint}'
