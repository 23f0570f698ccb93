"""Colors of what a screen shows: their kinds, and the contrast of words to their background."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.style import Style
from textual.color import Color

from tests.tui.screen_assertions import segments_of

MIN_CONTRAST = 4.5
"""For text, WCAG 2.1, 1.4.3."""


def illegible(app: Any) -> set[str]:
    """Words with low contrast to their background. What is drawn, bars and lines, is not looked at."""
    return {
        f"{one.text.strip()!r} {ratio:.2f}"
        for line in segments_of(app)
        for one in line
        if any(character.isalnum() for character in one.text)
        for ratio in _contrast_of(_seen(one.style))
        if ratio < MIN_CONTRAST
    }


def colors_of(app: Any) -> set[str]:
    """Of what kinds the colors are: default, standard, eight_bit, truecolor; none where there are none."""
    styles = [_seen(one.style) for line in segments_of(app) for one in line]
    return {color.type.name.lower() for style in styles for color in (style.color, style.bgcolor) if color}


def contrast(a: Color, b: Color) -> float:
    """As WCAG 2.1 defines it, from relative luminance: 1 to 21."""
    lighter, darker = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _contrast_of(style: Style) -> Iterator[float]:
    # What a terminal shows for one of its own sixteen is not known.
    if all(color is not None and color.triplet for color in (style.color, style.bgcolor)):
        yield contrast(*map(Color.from_rich_color, (style.color, style.bgcolor)))


def _luminance(color: Color) -> float:
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(part) for part in color.normalized)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _seen(style: Style | None) -> Style:
    """Without what a click runs."""
    return Style() if style is None else style.clear_meta_and_links()
