r"""Asks the terminal for its own colors with OSC 10 and 11, and removes the replies from the keyboard input.

A reply arrives as if the user had typed it: ``ESC ] 11 ; rgb:1c1c/1c1c/1c1c ESC \``. It may arrive in several
pieces and, on a slow link, a second after the query. Textual would read the reply as keys, so it is removed
from the input first. Control sequences: https://invisible-island.net/xterm/ctlseqs/ctlseqs.html, "Operating
System Commands".
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from textual.color import Color
from textual.message import Message

QUERY = "\x1b]10;?\x1b\\\x1b]11;?\x1b\\"
"""Escape sequences that ask for the foreground and background colors."""
_REPLY = re.compile(r"\x1b?\](1[01]);([^\x07\x1b]{1,40})(?:\x07|\x1b\\)")
_BEGINNING = re.compile(r"(?:\x1b|\x1b?\](?:1(?:[01](?:;[\w:/#]{0,40}\x1b?)?)?)?)\Z")
"""Matches the last characters of the input if they may be an incomplete reply."""
_COLOR = re.compile(
    r"rgba?:([0-9a-f]{1,4})/([0-9a-f]{1,4})/([0-9a-f]{1,4})(?:/[0-9a-f]{1,4})?", re.IGNORECASE
)
_TYPED = 3
"""Longest input, in characters, that a person may have typed although it looks like the beginning of a reply:
Escape, ``]``, ``1``. Longer input is treated as part of a reply.
"""
_TYPED_S = 0.1
"""Seconds to wait for the rest of a possible reply if a person may have typed its beginning."""
_EXPECTED_S = 3.0
"""Seconds after the query during which short input is held back if it may be the beginning of a reply. Later,
short input passes through at once, since a person has probably typed it.
"""
_UNABLE = ("linux", "vt", "dumb")
"""Prefixes of the ``TERM`` values of terminals that print sequences they do not recognize."""


@dataclass
class TerminalColor(Message):
    """A color that the terminal has reported: its foreground or its background color."""

    is_background: bool
    color: Color


def can_answer(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether :data:`QUERY` can be sent to this terminal. False if the terminal would print the query
    as text. True does not mean that the terminal will reply.
    """
    return not environment.get("TERM", "dumb").startswith(_UNABLE)


def is_light_by_environment(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether ``COLORFGBG``, which some terminals set (``0;15``), describes a light background."""
    number = environment.get("COLORFGBG", "").rpartition(";")[2]
    return number == "7" or (number.isdecimal() and 9 <= int(number) <= 15)


class ReplyReader:
    """Removes replies from the input, even if they arrive in parts, and passes everything else through."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._awaited = 0
        self._held, self._held_at = "", 0.0

    def expect(self, now: float) -> None:
        """Record that the query was sent at ``now``, a monotonic time in seconds."""
        self._asked_at, self._awaited = now, 2

    def read(self, typed: str, now: float) -> tuple[str, list[TerminalColor]]:
        """Return the input without replies, and the colors in the replies. ``now``: monotonic time, in
        seconds.
        """
        if not self._awaited:
            return typed, []
        text, self._held = self._held + typed, ""
        colors = [color for reply in _REPLY.finditer(text) if (color := _color(reply)) is not None]
        text, replies = _REPLY.subn("", text)
        self._awaited = max(0, self._awaited - replies)
        beginning = _BEGINNING.search(text) if self._awaited else None
        if beginning is not None and (len(beginning[0]) > _TYPED or self._is_soon(now)):
            text, self._held, self._held_at = text[: beginning.start()], beginning[0], now
        return text, colors

    def overdue(self, now: float) -> str:
        """Stop holding back short input, such as the Escape key, if the rest of a possible reply has not
        arrived in time, and return the input; return an empty string if there is none. ``now``:
        monotonic time, in seconds.
        """
        if not self._held or len(self._held) > _TYPED or now - self._held_at < _TYPED_S:
            return ""
        held, self._held = self._held, ""
        return held

    def _is_soon(self, now: float) -> bool:
        return self._asked_at is not None and now - self._asked_at < _EXPECTED_S


def _color(reply: re.Match[str]) -> TerminalColor | None:
    parts = _COLOR.fullmatch(reply[2])
    if parts is None:
        return None
    # The number of digits varies: "f", "ff" and "ffff" all mean full intensity.
    levels = (round(255 * int(part, 16) / (16 ** len(part) - 1)) for part in parts.groups())
    return TerminalColor(is_background=reply[1] == "11", color=Color(*levels))
