"""Text and lists that are written for their width, and drawings as high as their lines."""

from __future__ import annotations

from functools import partial

from textual.app import App, ComposeResult
from textual.containers import Vertical
from textual.content import Content

from qlora_tui.tui.widgets.controls import Drawing, Lines, ViList
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until


def _row(name: str, width: int) -> Content:
    return Content(f"{name} has {width} cells")


def _numbered(count: int, width: int, height: int) -> list[Content]:
    return [Content(f"line {number} of {width} cells") for number in range(count)][:height]


class Page(App[None]):
    CSS = "Drawing { height: auto; } ViList { height: 3; }"

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Lines()
            yield ViList()
            yield Drawing()
            yield Lines(Content("after the drawing"), id="after")

    def on_mount(self) -> None:
        self.query_one(Lines).show(partial(_row, "the text"))
        self.query_one(ViList).show(
            lambda width: [(name, _row(name, width)) for name in ("one", "two")], "two"
        )
        self.query_one(Drawing).show(partial(_numbered, 2))


async def test_text_lists_and_drawings_follow_the_width() -> None:
    async with Page().run_test(size=(60, 20)) as pilot:
        await wait_for_text(pilot, "the text has 60 cells", "two has 60 cells", "line 1 of 60 cells")
        await pilot.resize_terminal(40, 20)
        await wait_for_text(pilot, "the text has 40 cells", "two has 40 cells", "line 1 of 40 cells")
        assert pilot.app.query_one(ViList).current == "two"


async def test_a_drawing_is_as_high_as_its_lines() -> None:
    async with Page().run_test(size=(60, 20)) as pilot:
        await wait_for_text(pilot, "line 1")
        drawing, after = pilot.app.query_one(Drawing), pilot.app.query_one("#after")
        for count in (5, 1):
            drawing.show(partial(_numbered, count))
            await wait_until(pilot, lambda: after.region.y == drawing.region.y + count)  # noqa: B023
            assert f"line {count - 1} of" in text_of(pilot.app) and f"line {count} of" not in text_of(
                pilot.app
            )
