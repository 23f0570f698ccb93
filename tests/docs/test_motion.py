"""The moving picture of the README: every frame shows what its screenshot shows."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from screenshots.motion import Frame, animate

PICTURES = Path(__file__).parents[2] / "screenshots"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def frames() -> list[Frame]:
    names = ("home-120x40", "train-120x40", "home-120x40")
    return [Frame((PICTURES / f"{name}.svg").read_text(), 2.0) for name in names]


def texts(element: ElementTree.Element) -> list[str]:
    """The texts of the terminal, from top to bottom and left to right; without the window's title."""
    shown = [
        text
        for text in element.iter(f"{SVG}text")
        if "textLength" in text.attrib and (text.text or "").strip()
    ]
    place = sorted(shown, key=lambda text: (float(text.attrib["y"]), float(text.attrib["x"])))
    return [text.text or "" for text in place]


def test_every_frame_shows_the_texts_of_its_screenshot(frames: list[Frame]) -> None:
    moving = ElementTree.fromstring(animate(frames, still=1))
    by_id = {element.attrib["id"]: element for element in moving.iter() if "id" in element.attrib}
    for number, frame in enumerate(frames):
        used = by_id[f"frame-{number}"].iter(f"{SVG}use")
        assembled = ElementTree.Element("frame")
        assembled.extend(by_id[use.attrib["href"].removeprefix("#")] for use in used)
        assert texts(assembled) == texts(ElementTree.fromstring(frame.svg))
