"""Substitutes for characters that a terminal's font lacks: the Linux console has the 256 of code page 437.

Each has the same width as the original and replaces it in the text that is sent, so no screen needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping

_FALLBACKS = {
    "_": "▁▂▔",
    "▄": "▃▅",
    "█": "▆▇▋▊▉▙▛▜▟",
    "▌": "▏▎▍▖▘",
    "▐": "▕▗▝",
    "▒": "▚▞",
    "┌": "╭",
    "┐": "╮",
    "└": "╰",
    "┘": "╯↵⏎",
    "═": "━",
    "║": "┃‖",
    "►": "▸▶❯",
    "◄": "◂◀❮",
    "▲": "▴",
    "▼": "▾",
    "•": "●⬤",
    "○": "◌◯",
    "♦": "◆",
    "√": "✓✔",
    "x": "✗✘×",
    "*": "★✱",
    "!": "⚠",
    "<": "‹⟨",
    ">": "›⟩",
    "[": "⟦",
    "]": "⟧",
    "-": "–—−",
    "|": "✂",
    "~": "…⋯",
    "'": "’‘",
    "> ": "🔎",
    '"': "“”",
}
_CONTROL_PICTURES = range(0x2400, 0x2422)
"""The symbols that control characters are shown as."""
_UPPER = 0x01 | 0x02 | 0x08 | 0x10
"""The dots of a braille cell's upper two rows."""


def fallback_glyphs(terminal: str) -> Mapping[int, str]:
    """For ``str.translate``: what to send instead; empty where ``TERM`` names a terminal that needs none."""
    if terminal != "linux":
        return {}
    return (
        {ord(one): fallback for fallback, glyphs in _FALLBACKS.items() for one in glyphs}
        | {0x2800 + dots: _half_blocks(dots) for dots in range(256)}
        | dict.fromkeys(_CONTROL_PICTURES, "?")
    )


def _half_blocks(dots: int) -> str:
    upper, lower = dots & _UPPER, dots & ~_UPPER
    return "█" if upper and lower else "▀" if upper else "▄" if lower else " "
