"""Makes text from files, models, runs and servers safe for a terminal.

A terminal obeys control characters wherever they come from: they can set the clipboard and the title, clear
the screen, or display text in an order that differs from the stored one. Such characters are replaced by
symbols.
"""

from __future__ import annotations

import re
from functools import cache

_JOINERS = "\u180e\u200b-\u200d\u2060-\u2064\ufeff"
"""Zero-width characters that some writing systems and emoji need, but that can hide in ASCII text."""
_FLAG = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f"
"""A black flag followed by tag characters that name a region, as in the flag of Scotland."""
_CONTROLS = (
    # C0 except tab and line end, DEL and C1; lone surrogates, which no terminal can encode.
    "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
    # Line and paragraph separators, embeddings, overrides and isolates, deprecated and interlinear formats.
    "\u2028-\u202e\u2066-\u206f\ufff9-\ufffb"
    # Tag characters, and other characters of their plane that select nothing.
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
_HIGHEST_BMP = 0xFFFF


@cache
def _unsafe() -> re.Pattern[str]:
    # Compiled on first use: this takes milliseconds, and most processes never need it.
    return re.compile(f"(?P<flag>{_FLAG})|[{_CONTROLS}]|(?<![^\x00-\x7f{_JOINERS}{_CONTROLS}])[{_JOINERS}]")


def visible(text: str) -> str:
    """Return ``text`` with a symbol in place of each character that a terminal would obey or hide.

    ESC becomes ``␛``, and U+202E ``⟨U+202E⟩``. Line ends and tabs are unchanged. Joiners after a character
    outside ASCII are unchanged too, because emoji, Persian and Thai text need them.
    """
    return text if _is_plain(text) else _unsafe().sub(_symbol, text)


def visible_in_json(encoded: str) -> str:
    r"""Escape unsafe characters in JSON as ``\uXXXX``; it decodes to the same value."""
    return encoded if _is_plain(encoded) else _unsafe().sub(_escape, encoded)


def _is_plain(text: str) -> bool:
    return text.replace("\n", "").replace("\t", "").isprintable()


def _symbol(match: re.Match[str]) -> str:
    if match["flag"]:
        return match["flag"]
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _escape(match: re.Match[str]) -> str:
    if match["flag"]:
        return match["flag"]
    code = ord(match[0])
    if code <= _HIGHEST_BMP:
        return f"\\u{code:04x}"
    above = code - _HIGHEST_BMP - 1
    return f"\\u{0xD800 + (above >> 10):04x}\\u{0xDC00 + (above & 0x3FF):04x}"
