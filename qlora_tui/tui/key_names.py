"""How keys are written in sentences: ``[u]`` for a character, otherwise a name such as ``Enter`` or
``Ctrl+P``. The user's keymap determines the keys.

``key_name("app.undo")`` returns the key of a command. Constant texts contain the command's id instead, as in
``Press {app.undo} to undo.``, and go through ``name_keys`` when they are shown.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.keys import KEY_NAME_REPLACEMENTS, Keys, _character_to_key, format_key
from textual.style import Style

from qlora_tui.settings import Settings
from qlora_tui.tui.commands import COMMANDS, SCREENS, commands_by_screen
from qlora_tui.tui.textual_compat import active_app

_KEYS = re.compile(
    r"\[[^\s\[\]]{1,3}\]|\b(?:Enter|Esc|Tab|Space|Backspace|F\d{1,2}|(?:Ctrl|Alt|Shift)\+\w+)(?![\w-])"
)
TITLE_GAP = Content.styled(" · ", "not bold $text-muted")
"""Separates a title from the keys after it, since both are bold."""
_COMMAND = re.compile(r"\{([a-z]+\.[a-z_]+)\}")
_MODIFIERS = frozenset(("ctrl", "shift", "alt", "meta", "super", "hyper"))
_PRESS = "app.simulate_key"
"""Name of the action that runs when the user clicks the name of a key."""
_KEY_NAMES = frozenset((*(key.value for key in Keys), *KEY_NAME_REPLACEMENTS.values()))


def key_name(command_id: str) -> str:
    """Return the name of a command's first key for use in a sentence: ``[u]``, ``Enter``."""
    return _in_brackets(_keys(command_id)[0])


def key_names(command_id: str) -> str:
    """Return the names of all keys of a command for use in a sentence: ``[z] or Ctrl+O``."""
    return " or ".join(map(_in_brackets, _keys(command_id)))


def key_while_typing(command_id: str) -> str:
    """Return the name of the key that runs a command while a text field has the focus: the first key that
    does not type a character. If all keys of the command type characters, return the first key.
    """
    keys = _keys(command_id)
    return _in_brackets(next((key for key in keys if _character(key) is None), keys[0]))


def bare_key(command_id: str) -> str:
    """Return the name of a command's first key without brackets, for a column of keys: ``u``, ``Enter``."""
    return _bare(_keys(command_id)[0])


def short_key(key: str) -> str:
    """Convert a key from Textual's notation to the footer's: ``Enter``, ``F5``, ``^P``, ``u``."""
    return _bare(key).replace("Ctrl+", "^")


def short_keys(command_id: str) -> str:
    """Return all keys of a command in the footer's notation: ``z ^O``."""
    return " ".join(map(short_key, _keys(command_id)))


def dialog_keys(bindings: Sequence[BindingType], *others: str) -> Content:
    """Return the keys of a dialog and what they do, such as ``Enter watch  x cancel  Esc close``. A dialog
    shows this line because it has no footer. A click on a key presses the key.

    Args:
        bindings: The dialog's own keys; those without a description are left out.
        others: Keys of the fields and lists in the dialog; they come first.
    """
    hints = [key_hint(*other.split(" ", 1)) for other in others]
    for each in bindings:
        if isinstance(each, Binding) and each.description:
            key = _keys(each.id)[0] if each.id and each.id in COMMANDS else each.key.partition(",")[0]
            hints.append(key_hint(_bare(key), each.description.lower(), press=key))
    return Content("  ").join(hints)


def key_hint(shown: str, verb: str, press: str = "") -> Content:
    """Return a key and what it does, such as ``x cancel``, for the border of a panel or dialog.

    A click on the hint presses the key ``press``, given in Textual's notation. If ``press`` is empty, a click
    has no effect.
    """
    hint = Content.assemble((shown, "$key bold"), (f" {verb}", "not bold $text-muted"))
    return hint.stylize(_pressing(press)) if press else hint


def name_keys(text: str) -> str:
    """Replace each ``{command.id}`` with the key of that command."""
    return _COMMAND.sub(lambda match: key_name(match[1]), text)


def highlight_keys(text: str, style: str = "") -> Content:
    """Return ``text`` in ``style``, with its keys in the key color. A click on a key presses it. ``[u]``
    keeps its brackets.
    """
    content = Content.styled(text, style)
    for match in _KEYS.finditer(text):
        key = match[0].removeprefix("[").removesuffix("]") if match[0] != "[]]" else "]"
        content = content.stylize("bold $key", *match.span())
        content = content.stylize(_pressing(_textual_key(key)), *match.span())
    return content


def pressable(text: str, key: str) -> Content:
    """Return ``text`` as a link that presses ``key``, given in Textual's notation, when clicked."""
    return Content.styled(text, _pressing(key))


def settings_title(name: str, up: tuple[str, str], down: tuple[str, str]) -> Content:
    """Return the title ``name`` of a panel of settings, followed by what the two keys of each setting do:
    ``Change: lower case ×2, capital ÷2``. If the keys of ``up`` and ``down`` are not the same letter in lower
    and upper case, the title shows these two keys instead: ``Change: + ×2  - ÷2``.

    Args:
        name: Name of the panel.
        up: Id of the command that raises a setting, and what to show for this command.
        down: Id of the command that lowers the setting, and what to show for this command.
    """
    keys = [bare_key(command_id) for command_id, _ in (up, down)]
    if keys[0].islower() and keys[1] == keys[0].upper():
        return Content.assemble(name, (f": lower case {up[1]}, capital {down[1]}", "$text-muted not bold"))
    hints = [key_hint(key, does) for key, (_, does) in zip(keys, (up, down), strict=True)]
    return Content.assemble(f"{name}: ", Content("  ").join(hints))


def key_label(command_id: str) -> Content:
    """Return the name of a command's first key in the color of keys, for a column of keys. A click presses
    the key.
    """
    return pressable(bare_key(command_id), command_key(command_id)).stylize("bold $key")


def command_key(command_id: str) -> str:
    """Return the first key of a command in Textual's notation."""
    return _keys(command_id)[0]


def validate_keymap(keymap: Mapping[str, str]) -> list[str]:
    """Return a sentence for each unknown command or key in the keymap, and for each key that two commands
    share.
    """
    problems = [_unknown_command(name) for name in keymap if name not in COMMANDS]
    for name, keys in keymap.items():
        problems += [_invalid_key(name, key) for key in keys.split(",") if not _is_key(key)]
    for key, (mine, other) in _shared_keys(keymap):
        both = f"config.toml: {mine} and {other} both have the key {key}."
        problems.append(f"{both} Give one of them another key in [keymap].")
    return problems


def _shared_keys(keymap: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (key, (command id, other command id)) for each key that a command in the keymap shares with
    another command on the same screen.
    """
    everywhere, *screens = commands_by_screen()
    # In a modal, the app's own keys do nothing.
    without_app_keys = {"Everywhere", *(entry.label for entry in SCREENS if entry.is_modal)}
    for heading, commands in [everywhere, *screens]:
        offered = commands if heading in without_app_keys else (*commands, *everywhere[1])
        for mine in (command for command in commands if command.id in keymap):
            for other in offered:
                for key in {*mine.keys(keymap)} & {*other.keys(keymap)}:
                    # Default keys are not reported. Some default keys have two commands, which are never
                    # available at the same time.
                    if other.id != mine.id and key not in mine.key.split(","):
                        yield key, (mine.id, other.id)


def _is_key(key: str) -> bool:
    """Return whether Textual has a key with this name, such as ``q``, ``ctrl+o``, ``shift+tab`` or
    ``slash``.
    """
    *modifiers, base = key.split("+")
    return _MODIFIERS.issuperset(modifiers) and (len(base) == 1 or base in _KEY_NAMES or _is_character(base))


def _is_character(name: str) -> bool:
    try:
        unicodedata.lookup(name.replace("_", " "))
    except KeyError:
        return False
    return name == name.lower()


def _nearest(name: str, known: Collection[str]) -> str:
    from difflib import get_close_matches  # only needed for a keymap with an error

    return next(iter(get_close_matches(name, known, 1)), "")


def _unknown_command(name: str) -> str:
    near = _nearest(name, COMMANDS)
    meant = f" Did you mean {near}?" if near else ""
    listed = f"Press {key_name('app.keys')} to list all commands."
    return f"config.toml: {name} in [keymap] is not a command.{meant} {listed}"


def _invalid_key(name: str, key: str) -> str:
    written = key.strip().replace("^", "ctrl+")
    *modifiers, base = written.split("+")
    if not _is_key(written) and (near := _nearest(base, _KEY_NAMES)):
        written = "+".join([*modifiers, near])
    hint = f' Write "{written}".' if _is_key(written) else ""
    return f'config.toml: {name} in [keymap] has the key "{key}", which does not exist.{hint}'


def keys_in(content: Content) -> set[str]:
    """Return the keys, in Textual's notation, that are pressed when the user clicks on parts of
    ``content``.
    """
    styles = (span.style for span in content.spans)
    clicks = (style.meta.get("@click") for style in styles if isinstance(style, Style))
    return {click[1][0] for click in clicks if isinstance(click, tuple) and click[0] == _PRESS}


def _pressing(key: str) -> Style:
    return Style.from_meta({"@click": (_PRESS, (key,))})


def _textual_key(shown: str) -> str:
    """Convert a key's name, such as ``u``, ``Ctrl+P`` or ``?``, to Textual's notation."""
    if len(shown) == 1:
        return _character_to_key(shown)
    return "+".join({"esc": "escape"}.get(part, part) for part in shown.lower().split("+"))


def _keys(command_id: str) -> list[str]:
    return COMMANDS[command_id].keys(_keymap())


def _keymap() -> Mapping[str, str]:
    """Return the keymap of the running app; empty if no app is running, or if the app has no settings, as in
    some tests.
    """
    settings: Settings = getattr(active_app.get(None), "settings", Settings())
    return settings.keymap


def _in_brackets(key: str) -> str:
    return _bare(key) if _character(key) is None else f"[{_bare(key)}]"


def _bare(key: str) -> str:
    if (character := _character(key)) is not None:
        return character
    return "+".join("Esc" if part == "escape" else part.title() for part in key.split("+"))


def _character(key: str) -> str | None:
    """Return the character that a key types; None for a named key or a combination."""
    if len(key) == 1:
        return key
    # Textual's symbols for arrows and Enter are characters, too, but not ASCII.
    shown = format_key(key)
    return shown if len(shown) == 1 and shown.isascii() else None
