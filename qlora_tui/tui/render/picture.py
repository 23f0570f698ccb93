"""Pictures of a few simple shapes, as SVG files or as PNG files drawn by Pillow, and their colors.

Text uses the viewer's fonts, whose widths are unknown, so text is cut and wrapped by estimated widths. The
files contain no scripts, fonts or links. Characters that are invisible or that XML does not allow are
replaced with symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from rich.cells import cell_len

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.installation import install_command
from qlora_tui.visible import visible

_SCALE = 2
"""Pixels of a PNG file per unit of the SVG."""
_SAMPLES = 2
"""Samples per pixel of a PNG file in each direction; a pixel's color is the mean of its samples."""
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
_BOLD_STROKE = 0.025
"""Width of the stroke around bold letters, relative to the font size. It replaces the bold font, which Pillow
does not have.
"""
_WIDE, _NARROW, _USUAL = 1.0, 0.34, 0.6
"""Estimated widths of characters relative to the font size. The estimates are generous: most characters are
narrower.
"""
_NARROW_CHARACTERS = frozenset("iljtfr.,:;'|!()[] ")
_UPPER = 0.75


@dataclass(frozen=True, kw_only=True)
class Colors:
    """Colors of a chart in a picture. These colors do not depend on the theme of the app."""

    raw: str
    mean: str
    validation: str
    labels: str
    grid: str
    fill: str = ""
    """Color of the area under the smoothed loss; empty for none."""
    grid_opacity: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CardColors(Colors):
    """Colors of a run card and of its chart. ``validation`` is also the color of a better value."""

    background: str
    panel: str
    title: str
    text: str
    worse: str


ON_ANY = Colors(
    raw="#9a9a9a", mean="#2f7fb5", validation="#2e8b57", labels="#777777", grid="#777777", grid_opacity=0.3
)
"""Colors that are readable on both white and black."""
CARD = CardColors(
    background="#10151c",
    panel="#18202a",
    title="#f2f5f8",
    text="#c3ced9",
    labels="#8797a8",
    raw="#4a5a6b",
    mean="#5fafd7",
    validation="#87d787",
    worse="#ffaf5f",
    grid="#2b3643",
    fill="#1d2f3f",
)


def document(width: int, height: int, parts: Iterable[str]) -> str:
    """Return an SVG document with these shapes."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    return "\n".join([head, *parts, "</svg>", ""])


def rectangle(x: float, y: float, width: float, height: float, color: str, radius: float = 0) -> str:
    """Return a filled rectangle with corners rounded by ``radius``."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}"'
    return f'<rect {place} fill="{color}"/>'


def straight(x1: float, y1: float, x2: float, y2: float, color: str, opacity: float = 1.0) -> str:
    """Return a thin straight line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-opacity="{opacity:g}"/>'


def curve(points: Iterable[tuple[float, float]], color: str, width: float) -> list[str]:
    """Return lines through the finite points, with a gap at each point that is not finite."""
    parts = []
    for is_finite, stretch in groupby(points, key=lambda point: math.isfinite(point[1])):
        if is_finite:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
    return parts


def area(points: Sequence[tuple[float, float]], color: str) -> str:
    """Return a filled polygon with these corners."""
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{color}"/>'


def circle(x: float, y: float, radius: float, color: str) -> str:
    """Return a filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{color}"/>'


def star(x: float, y: float, radius: float, color: str) -> str:
    """Return a five-pointed star."""
    corners = ((math.pi * number / 5, radius if number % 2 == 0 else radius * 0.42) for number in range(10))
    return area([(x + far * math.sin(turn), y - far * math.cos(turn)) for turn, far in corners], color)


def arrow(x: float, y: float, length: float, color: str) -> list[str]:
    """Return the shapes of an arrow that starts at (x, y) and points right. Shapes are used because not every
    font has an arrow.
    """
    tip, half = x + length, length / 4
    head = area([(tip - 1.6 * half, y - half), (tip, y), (tip - 1.6 * half, y + half)], color)
    return [rectangle(x, y - 1.5, length - half, 3, color), head]


def text(
    x: float, y: float, words: str, color: str, *, size: float = 13, anchor: str = "start", bold: bool = False
) -> str:
    """Return a line of text on the baseline ``y``."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"'
    weight = ' font-weight="600"' if bold else ""
    return f'<text {place}{weight} fill="{color}">{escape(printable(words))}</text>'


def printable(words: str) -> str:
    """Return the text on one line, with symbols in place of characters that are invisible or that XML does
    not allow.
    """
    return visible(" ".join(words.split()))


def text_width(words: str, size: float) -> float:
    """Return the estimated width of a line of text."""
    return size * sum(map(_character_width, words))


def _character_width(character: str) -> float:
    if character in _NARROW_CHARACTERS:
        return _NARROW
    if character.isupper() or character in "mwMW%@—…":
        return _UPPER
    return _USUAL if cell_len(character) < 2 else _WIDE


def cut(words: str, width: float, size: float) -> str:
    """Return the text. If it is wider than ``width`` at this font size, return as much of its beginning as
    fits, and an ellipsis.
    """
    return (broken(words, width, size, 1) or [""])[0]


def broken(words: str, width: float, size: float, most: int) -> list[str]:
    """Wrap text into at most ``most`` lines of this width at this font size. If there is more text, the last
    line ends with an ellipsis.

    Lines break at spaces, or within a word that is longer than a line.
    """
    rest = printable(words[: most * 400])
    lines: list[str] = []
    while rest and len(lines) < most:
        end = _fitting(rest, width, size)
        if end < len(rest):
            end = rest.rfind(" ", 1, end + 1) if " " in rest[1 : end + 1] else end
        line, rest = rest[:end].rstrip(), rest[end:].lstrip()
        lines.append(line)
    if rest and lines:
        end = _fitting(lines[-1], width - size * _UPPER, size)
        lines[-1] = f"{lines[-1][:end].rstrip()}…"
    return lines


def _fitting(words: str, width: float, size: float) -> int:
    """Return how many characters of the text fit ``width`` at this font size. The result is at least 1."""
    used = 0.0
    for number, character in enumerate(words):
        used += size * _character_width(character)
        if used > width:
            return max(1, number)
    return len(words)


def picture_file(svg: str, kind: str, background: str = "#ffffff") -> bytes:
    """Return the contents of a picture file. ``kind``: its extension, ``.svg`` or ``.png``.

    Raises UserError for a PNG file if Pillow is not installed.
    """
    return svg.encode() if kind == ".svg" else _png(svg, background)


def _png(svg: str, background: str) -> bytes:
    """Return the picture as a PNG file, drawn by Pillow. Raises UserError if Pillow is not installed."""
    import io
    import xml.etree.ElementTree as ET

    try:
        from PIL import Image, ImageColor, ImageDraw, ImageFont
    except ImportError:
        raise UserError(
            "Pillow is not installed",
            what="PNG pictures are drawn by Pillow.",
            fix=f"Install it with `{install_command('pillow')}`, or save a picture as .svg.",
            exit_code=EXIT_USAGE,
        ) from None
    root = ET.fromstring(svg)
    unit = _SCALE * _SAMPLES
    size = [int(root.attrib[side]) for side in ("width", "height")]
    image = Image.new("RGB", (size[0] * unit, size[1] * unit), background)
    draw = ImageDraw.Draw(image)

    def blended(color: str, opacity: float) -> tuple[int, ...]:
        pairs = zip(ImageColor.getrgb(color), ImageColor.getrgb(background), strict=True)
        return tuple(round(own * opacity + behind * (1 - opacity)) for own, behind in pairs)

    def at(shape: dict[str, str], *names: str) -> list[float]:
        return [float(shape[name]) * unit for name in names]

    def corners(shape: dict[str, str]) -> list[float]:
        return [float(number) * unit for number in shape["points"].replace(",", " ").split()]

    for element in root:
        shape: dict[str, Any] = element.attrib
        match element.tag.rpartition("}")[2]:
            case "rect":
                x, y, width, height, radius = at(shape, "x", "y", "width", "height", "rx")
                draw.rounded_rectangle((x, y, x + width, y + height), radius, shape["fill"])
            case "line":
                color = blended(shape["stroke"], float(shape.get("stroke-opacity", 1)))
                draw.line(at(shape, "x1", "y1", "x2", "y2"), fill=color, width=unit)
            case "polyline":
                width = round(float(shape["stroke-width"]) * unit)
                draw.line(corners(shape), fill=shape["stroke"], width=width, joint="curve")
            case "polygon":
                draw.polygon(corners(shape), fill=shape["fill"])
            case "circle":
                x, y, radius = at(shape, "cx", "cy", "r")
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape["fill"])
            case "text":
                height = float(shape["font-size"]) * unit
                draw.text(
                    at(shape, "x", "y"),
                    element.text or "",
                    shape["fill"],
                    ImageFont.load_default(height),
                    _ANCHORS[shape["text-anchor"]],
                    stroke_width=height * _BOLD_STROKE if "font-weight" in shape else 0,
                )
    small = image.resize((size[0] * _SCALE, size[1] * _SCALE), Image.Resampling.BOX)
    content = io.BytesIO()
    small.save(content, "PNG")
    return content.getvalue()
