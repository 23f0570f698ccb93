"""Tables in lines of text."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.tui.render.columns import Column, table

ROWS = [("qwen2.5-7b-tickets-1", 12), ("owls", 3_400)]
COLUMNS = (
    Column[tuple[str, int]](title="name", text=lambda row: row[0], fills=True, width=8),
    Column[tuple[str, int]](title="rows", text=lambda row: f"{row[1]:,}", right=True),
    Column[tuple[str, int]](text=lambda row: Content.styled("✓", "$success"), shown_from=40),
)


def _plain(width: int) -> list[str]:
    return [line.plain.rstrip() for line in table(COLUMNS, ROWS, width)]


def test_the_column_that_fills_takes_what_the_others_leave() -> None:
    assert _plain(30) == [
        "name                      rows",
        "qwen2.5-7b-tickets-1        12",
        "owls                     3,400",
    ]


def test_names_are_cut_in_their_middle_and_columns_without_room_are_left_out() -> None:
    assert [line[-1] for line in _plain(40)[1:]] == ["✓", "✓"]
    narrow = _plain(20)
    assert max(map(len, narrow)) == 20
    assert narrow[1].startswith("qwen2") and "…" in narrow[1] and narrow[1].split("…")[1].startswith("kets-1")
