"""Escape sequences for what a terminal does beside showing text: its clipboard, its title, a notification.

Inside tmux what it does not know is wrapped, and tmux hands it on (where its ``allow-passthrough`` is on).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping

PUSH_TITLE = "\x1b[22;0t"
"""Have the terminal remember its title; :data:`POP_TITLE` brings it back."""
POP_TITLE = "\x1b[23;0t"


def set_clipboard(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """OSC 52; inside tmux a second time, wrapped, since either may be what is allowed there."""
    osc = f"\x1b]52;c;{base64.b64encode(text.encode(errors='replace')).decode()}\a"
    return osc + _for_tmux(osc) if environment.get("TMUX") else osc


def set_title(text: str) -> str:
    """OSC 2, which tmux knows."""
    return f"\x1b]2;{_printable(text)}\a"


def notification(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """OSC 9: a desktop notification, where the terminal has them."""
    osc = f"\x1b]9;{_printable(text)}\a"
    return _for_tmux(osc) if environment.get("TMUX") else osc


def _for_tmux(sequence: str) -> str:
    return "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())
