"""Text and lists that are written for their width, drawings as high as their lines, and panels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.color import Color as RichColor
from textual.app import App, ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.screen import Screen
from textual.scrollbar import ScrollBar
from textual.widgets import Static
from textual.widgets.option_list import Option

from qlora_tui import tui
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.loss import validation_lines
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, ViList
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


class Panels(QloraApp):
    """The app with one screen of two panels, of which the first can have the focus."""

    CSS_PATH = str(Path(tui.__file__).with_name("app.tcss"))
    MODES: ClassVar[dict[str, Any]] = {"home": Screen[None]}

    def on_mount(self) -> None:
        self.call_after_refresh(
            self.screen.mount,
            Panel("Runs", ViList(Option("a run")), id="runs"),
            Panel("Queue", Static("of two", id="queued"), keys=(("app.undo", "back"),), id="queue"),
        )


class Columns(App[None]):
    """A list, a text that is never cut, and a graph, in a column."""

    CSS = """
    Vertical { layout: column; }
    ViList, #text { height: auto; }
    #graph { height: 1fr; min-height: 4; }
    """

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Panel("List", ViList(*[Option(f"row {number}") for number in range(20)]))
            yield Static("one\ntwo\nthree", id="text")
            yield Drawing(id="graph")


@pytest.mark.parametrize(("rows", "heights"), [(60, (22, 3, 35)), (30, (22, 3, 5)), (20, (13, 3, 4))])
async def test_only_what_scrolls_is_cut_and_only_if_the_rows_do_not_suffice(
    rows: int, heights: tuple[int, int, int]
) -> None:
    app = Columns()
    async with app.run_test(size=(60, rows)) as pilot:
        await wait_for_text(pilot, "row 1", "three")
        shown = [app.query_one(each).outer_size.height for each in ("Panel", "#text", "#graph")]
        assert tuple(shown) == heights
        assert (app.query_one(ViList).max_scroll_y > 0) == (rows < 30)


class EndOfColumn(App[None]):
    """Two panels, the last with a row below it."""

    CSS = """
    Vertical { layout: column; }
    #last { margin-bottom: 1; }
    """

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Panel("First", Static("one\ntwo\nthree"))
            yield Panel("Last", Lines(Content("one\ntwo\nthree")), id="last")


@pytest.mark.parametrize(("rows", "heights"), [(14, (5, 8)), (11, (5, 5)), (10, (5, 4)), (9, (8, 0))])
async def test_the_last_panel_takes_free_rows_says_what_it_hides_and_without_two_rows_is_left_out(
    rows: int, heights: tuple[int, int]
) -> None:
    app = EndOfColumn()
    async with app.run_test(size=(60, rows)) as pilot:
        shown = (await wait_for_text(pilot, "three")).splitlines()
        assert tuple(panel.outer_size.height for panel in app.query(Panel)) == heights
        assert not shown[-1].strip() and ("Last" in "".join(shown)) == bool(heights[1])
        assert [line.split() for line in shown if "↓" in line] == [["two", "1", "more", "↓"]] * (rows == 10)


def test_validation_that_does_not_fit_says_how_it_began() -> None:
    evaluations = [(0, 4.0, ""), (10, 3.8, ""), (20, 3.4, ""), (30, 3.6, "")]
    whole = [line.plain for line in validation_lines(evaluations, 20, 40, 5)]
    _, newest, best, more = (line.plain for line in validation_lines(evaluations, 20, 40, 4))
    assert whole[1:3] == [newest, best] and len(whole) == 5
    bar = best.count("▄")
    assert f" ▲{'▄' * (bar // 2 - 1)}" in newest and bar > 5
    assert whole[3].count("▄") == bar // 2
    assert more.strip() == "2 more, 4.000 at step 0"
    begins = [line.plain.split()[:2] for line in validation_lines(evaluations, 0, 40, 4)[1:]]
    assert begins == [["30", "3.600"], ["20", "3.400"], ["2", "more,"]], "without a gap"
    tiny = [(0, 2.0, ""), (10, 1.999, ""), (20, 1.998, "")]
    assert all(line.plain.count("▄") <= 1 for line in validation_lines(tiny, 20, 60, 4))


@pytest.mark.parametrize(("term", "edge"), [("xterm-256color", "▐"), ("screen", "─")])
async def test_only_the_panel_with_the_focus_has_a_frame(
    private_home: Path, monkeypatch: pytest.MonkeyPatch, term: str, edge: str
) -> None:
    monkeypatch.setenv("TERM", term)
    app = Panels()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "of two")
        app.set_focus(None)
        await wait_for_text(pilot, edge)
        assert "╭" not in text_of(app)
        places = [widget.content_region for widget in app.query("ViList, #queued")]
        app.query_one(ViList).focus()
        lines = (await wait_for_text(pilot, "╭")).splitlines()
        assert [widget.content_region for widget in app.query("ViList, #queued")] == places
        assert [line.find("╭") for line in lines if "╭" in line] == [0]
        starts = ("Runs", "a run", "Queue", "of two")
        assert {line.index(text) for line in lines for text in starts if text in line} == {2}


async def test_a_panel_with_nothing_to_show_is_one_line(private_home: Path) -> None:
    app = Panels()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "of two")
        queue = app.query_one("#queue", Panel)
        height, queue.empty = queue.outer_size.height, "empty"
        lines = (await wait_for_text(pilot, "Queue: empty")).splitlines()
        assert queue.outer_size.height == 1
        assert not any("of two" in line or "back" in line for line in lines)
        queue.empty = ""
        await wait_for_text(pilot, "of two", "u back")
        assert queue.outer_size.height == height


async def test_a_notification_leaves_the_footer_in_view(private_home: Path) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "? Help")
        app.notify("A long notification. " * 5)
        lines = (await wait_for_text(pilot, "A long notification.")).splitlines()
        assert "^P Palette" in lines[-1] and "? Help" in lines[-1]
        assert "notification" in lines[-2]


@pytest.mark.parametrize(("background", "lines"), [("default", 6), ("#303030", 0)])
def test_the_track_of_a_scroll_bar_is_seen_on_the_terminals_background(background: str, lines: int) -> None:
    back, bar = RichColor.parse(background), RichColor.parse("white")
    drawn = ScrollBar.renderer.render_bar(10, 50, 20, 0, vertical=True, back_color=back, bar_color=bar)
    assert [segment.text for segment in drawn.segments].count("│") == lines
