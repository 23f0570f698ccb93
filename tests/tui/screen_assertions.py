"""What a person would see: the text on the screen, waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.pilot import Pilot
from textual.strip import Strip

DEADLINE_S = 120.0
"""A guard against waiting for ever, not a budget."""


def text_of(app: Any) -> str:
    """The characters on the screen, line by line."""
    return text_in(segments_of(app))


def text_in(lines: list[list[Segment]]) -> str:
    """The characters of what a screen painted."""
    return "\n".join("".join(segment.text for segment in line) for line in lines)


def style_of(app: Any, text: str) -> Style:
    """Return the style of the first occurrence of ``text``."""
    segments = (segment for line in segments_of(app) for segment in line)
    return next((one.style for one in segments if text in one.text and one.style), Style())


def segments_of(app: Any) -> list[list[Segment]]:
    """What the screen paints, line by line; of a dialog also what is dim behind it."""
    painted = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens)
    return [_flat(strip) for strip in painted.strips]


def segments_in_front(app: Any) -> list[list[Segment]]:
    """What the screen paints; of a dialog its own cells, without what is dim behind it."""
    lines = segments_of(app)
    if not app.screen.is_modal:
        return lines
    front = Region.from_union([child.region for child in app.screen.children if child.display])
    return [list(Strip(line).crop(front.x, front.right)) for line in lines[front.y : front.bottom]]


async def wait_for_text(pilot: Pilot[Any], *texts: str) -> str:
    """Wait until all of these are on the screen; the screen's text."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        await pilot.pause()
        shown = text_of(pilot.app)
        missing = [text for text in texts if text not in shown]
        if not missing:
            return shown
        if time.monotonic() > deadline:
            raise AssertionError(f"not on the screen: {missing}\n{shown}")
        await pilot.pause(0.05)


async def wait_until(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
    """Let the app run until ``condition`` is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(text_of(pilot.app))
        await pilot.pause(0.05)


def _flat(strip: Any) -> list[Segment]:
    if isinstance(strip, Segment):
        return [strip]
    return [segment for part in strip for segment in _flat(part)]
