"""The loss of a run as a PNG picture, for programs that show no SVG: drawn by Pillow, if it is installed."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from typing import Any

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.installation import install_command

_SCALE = 2
"""Pixels per unit of the SVG."""
_SAMPLES = 2
"""Samples per pixel, each way, of which the picture is the mean."""
_BACKGROUND = "#ffffff"
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def loss_png(svg: str) -> bytes:
    """Draw the picture of :mod:`.loss_svg` on white. Raises UserError where Pillow is not installed."""
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
    image = Image.new("RGB", (size[0] * unit, size[1] * unit), _BACKGROUND)
    draw = ImageDraw.Draw(image)

    def blended(color: str, opacity: float) -> tuple[int, ...]:
        pairs = zip(ImageColor.getrgb(color), ImageColor.getrgb(_BACKGROUND), strict=True)
        return tuple(round(own * opacity + behind * (1 - opacity)) for own, behind in pairs)

    def at(shape: dict[str, str], *names: str) -> list[float]:
        return [float(shape[name]) * unit for name in names]

    for element in root:
        shape: dict[str, Any] = element.attrib
        match element.tag.rpartition("}")[2]:
            case "line":
                color = blended(shape["stroke"], float(shape.get("stroke-opacity", 1)))
                draw.line(at(shape, "x1", "y1", "x2", "y2"), fill=color, width=unit)
            case "polyline":
                points = [float(number) * unit for number in shape["points"].replace(",", " ").split()]
                width = round(float(shape["stroke-width"]) * unit)
                draw.line(points, fill=shape["stroke"], width=width, joint="curve")
            case "circle":
                x, y, radius = at(shape, "cx", "cy", "r")
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape["fill"])
            case "text":
                font = ImageFont.load_default(float(shape["font-size"]) * unit)
                anchor = _ANCHORS[shape["text-anchor"]]
                draw.text(at(shape, "x", "y"), element.text or "", shape["fill"], font, anchor)
    small = image.resize((size[0] * _SCALE, size[1] * _SCALE), Image.Resampling.BOX)
    content = io.BytesIO()
    small.save(content, "PNG")
    return content.getvalue()
