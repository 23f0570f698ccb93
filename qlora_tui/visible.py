"""Text from files, models, runs and servers, made safe for a terminal.

A terminal obeys control characters wherever they come from: they can set the clipboard and the title, clear
the screen, or make text read in another order than it is stored. Such characters are replaced by symbols.
"""

from __future__ import annotations

import re

_JOINERS = "\u180e\u200b-\u200d\u2060-\u2064\ufeff"
"""Zero-width characters that scripts and emoji need, and that hide in ASCII."""
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
"""Choose the look of the character before them: one each."""
_FLAG = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f"
"""A black flag and the tag characters that name a region, as in the flag of Scotland."""
_OBEYED = (
    # C0 but for tab and line end, DEL and C1; lone surrogates, which no terminal's encoding has.
    "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
    # Line and paragraph separators, embeddings, overrides and isolates, deprecated and interlinear formats.
    "\u2028-\u202e\u2066-\u206f\ufff9-\ufffb"
    # Tag characters, and what else of their plane selects nothing.
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
_UNSAFE = re.compile(
    f"(?P<flag>{_FLAG})"
    f"|[{_OBEYED}]"
    f"|(?<![^\x00-\x7f{_JOINERS}{_OBEYED}])[{_JOINERS}]"
    # Digits, # and * take a selector too: they become keycaps.
    f"|(?<![^\x00-\\x22\\x24-\\x29\\x2b-\\x2f\\x3a-\x7f{_SELECTORS}{_OBEYED}])[{_SELECTORS}]"
)
_HIGHEST_BMP = 0xFFFF


def visible(text: str) -> str:
    """``text`` with a symbol for each character that a terminal would obey or hide.

    ESC becomes ``␛``, U+202E ``⟨U+202E⟩``. Line ends and tabs stay, as do joiners and selectors after a
    character that is not ASCII: emoji, Persian and Thai text need them.
    """
    if text.isprintable() and text.isascii():
        return text
    return _UNSAFE.sub(_symbol, text)


def visible_in_json(encoded: str) -> str:
    r"""JSON with ``\uXXXX`` in place of the same characters; it decodes to what it did."""
    return _UNSAFE.sub(_escape, encoded)


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
