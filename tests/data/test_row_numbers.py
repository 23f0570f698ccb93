"""Row numbers in a recipe, and the rows that they leave out of the tokenized data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.inspection import inspect
from qlora_tui.data.row_numbers import format_row_numbers, parse_row_numbers
from qlora_tui.errors import UserError
from tests.data.families import family
from tests.data.test_dataset import pairs, recipe, write


def test_numbers_and_ranges_are_read_and_written_shortest() -> None:
    assert parse_row_numbers(" 3, 17,40 - 42,") == {3, 17, 40, 41, 42}
    assert parse_row_numbers("") == frozenset()
    assert format_row_numbers([42, 3, 41, 40, 3]) == "3, 40-42"
    assert parse_row_numbers(format_row_numbers(range(1, 9))) == set(range(1, 9))


@pytest.mark.parametrize(
    "text", ["x", "0", "5-3", "1-99999999999", "1;2", "-4", "1-9000000, 9000001-18000000"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="neither a row number"):
        parse_row_numbers(text)


def test_excluded_rows_are_in_neither_split(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(40))
    every = prepare_dataset(recipe(source), family("chatml"))
    fewer = prepare_dataset(
        recipe(msgspec.structs.replace(source, excluded_rows="2, 10-12")), family("chatml")
    )
    assert every.data_hash != fewer.data_hash
    rows = {side.origin(i)[1] for side in (fewer.train, fewer.validation) for i in range(len(side))}
    assert rows == set(range(1, 41)) - {2, 10, 11, 12}
    assert (fewer.counts.rows, fewer.counts.excluded) == (36, 4)


def test_the_report_does_not_count_excluded_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(40))
    whole = inspect(source, family("chatml")).counts
    counts = inspect(msgspec.structs.replace(source, excluded_rows="2, 39-40"), family("chatml")).counts
    assert (counts.rows, counts.samples, counts.excluded) == (37, 37, 3)
    assert (whole.rows, whole.excluded) == (40, 0) and counts.tokens < whole.tokens
