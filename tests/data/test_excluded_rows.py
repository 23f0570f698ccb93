"""Rows that a recipe leaves out, and what is read without them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.excluded_rows import (
    RowPlace,
    excluded_by_path,
    format_excluded_rows,
    format_row_numbers,
    parse_excluded_rows,
    parse_row_numbers,
    without_rows,
)
from qlora_tui.data.inspection import inspect
from qlora_tui.data.quick_check import quick_check
from qlora_tui.data.sources import open_source
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from tests.data.families import family
from tests.data.test_dataset import pairs, recipe, write


def test_numbers_and_ranges_are_read_and_written_shortest() -> None:
    assert parse_row_numbers(" 3, 17,40 - 42,") == {3, 17, 40, 41, 42}
    assert parse_row_numbers("") == frozenset()
    assert format_row_numbers([42, 3, 41, 40, 3]) == "3, 40-42"
    assert parse_row_numbers(format_row_numbers(range(1, 9))) == set(range(1, 9))


@pytest.mark.parametrize("text", ["x", "0", "5-3", "1-99999999999", "-4", "1-9000000, 9000001-18000000"])
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


def test_excluded_rows_at_the_end_are_still_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(40))
    (file,) = inspect(msgspec.structs.replace(source, excluded_rows="30-40")).files
    assert file.last_row == 40


def folder_of(path: Path) -> Source:
    (path / "more").mkdir()
    write(path / "a.jsonl", pairs(20, "a"))
    write(path / "more" / "b.jsonl", pairs(20, "b"))
    return Source(path=str(path))


def test_rows_of_files_are_read_and_written() -> None:
    text = "5; a.jsonl: 3-4, 17; more/b.jsonl: 40-45"
    excluded = parse_excluded_rows("more/b.jsonl :40-45;a.jsonl:17, 3-4 ; 5")
    assert excluded == {"": {5}, "a.jsonl": {3, 4, 17}, "more/b.jsonl": set(range(40, 46))}
    assert format_excluded_rows(excluded) == text


@pytest.mark.parametrize("name", ["a;b: c.jsonl", '"x".csv', " edge.jsonl", "\udce4.txt", "7", "tab\t.csv"])
def test_any_file_name_survives_the_recipe(name: str) -> None:
    written = format_excluded_rows({name: frozenset({3}), "": frozenset({1})})
    written.encode()
    assert parse_excluded_rows(written) == {name: {3}, "": {1}}


@pytest.mark.parametrize("text", ["a.jsonl: x", "a: b: 3", '"a: 3', '"": 3', ": 3", "[3]: 1: 2"])
def test_other_text_on_files_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="neither a row number"):
        parse_excluded_rows(text)


def test_rows_of_one_file_of_a_folder_are_left_out(tmp_path: Path) -> None:
    places = [RowPlace("a.jsonl", 3), RowPlace("more/b.jsonl", 20)]
    source = without_rows(folder_of(tmp_path), places)
    assert source.excluded_rows == "a.jsonl: 3; more/b.jsonl: 20"
    prepared = prepare_dataset(recipe(source), family("chatml"))
    stored = {
        RowPlace(side.file_name(i), side.origin(i)[1])
        for side in (prepared.train, prepared.validation)
        for i in range(len(side))
    }
    every = {RowPlace(name, row) for name in ("a.jsonl", "more/b.jsonl") for row in range(1, 21)}
    assert stored == every - set(places)
    assert inspect(source, family("chatml")).counts.excluded == 2


def test_numbers_without_a_file_hold_for_every_file(tmp_path: Path) -> None:
    source = msgspec.structs.replace(folder_of(tmp_path), excluded_rows="3, 4; a.jsonl: 5")
    counts = inspect(source).counts
    assert (counts.rows, counts.excluded) == (35, 5)


def test_a_file_that_the_source_lacks_is_an_error(tmp_path: Path) -> None:
    source = msgspec.structs.replace(folder_of(tmp_path), excluded_rows="b.jsonl: 3")
    with pytest.raises(UserError, match=r"names 'b\.jsonl'"):
        inspect(source)
    alone = tmp_path / "a.jsonl"
    by_name = Source(path=str(alone), excluded_rows="a.jsonl: 3; 4")
    assert excluded_by_path(by_name, [alone]) == {alone: {3, 4}}


def test_excluded_rows_neither_count_nor_block_a_launch(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, pairs(20))
    path.write_text(path.read_text() + "{broken\n")
    files, _ = open_source(Source(path=str(path)), "refuse")
    with pytest.raises(UserError, match="not valid JSON"):
        quick_check(files, Data())
    files, _ = open_source(Source(path=str(path), excluded_rows="1, 21"), "refuse")
    (size,) = quick_check(files, Data()).sizes
    assert (size.rows, size.samples, size.excluded) == (19, 19, 2)
