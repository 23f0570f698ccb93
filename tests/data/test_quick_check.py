"""Rows that block a run are found before it is queued, as far as there is time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tui.data.quick_check import QuickCheckResult, quick_check
from qlora_tui.data.sources import open_source
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source

_GOOD = '{"prompt": "a", "completion": "b"}\n'


def _look(path: Path, patience_s: float = 60.0, data: Data | None = None) -> QuickCheckResult:
    data = data or Data()
    return quick_check(open_source(Source(path=str(path)), data.preferences)[0], data, None, patience_s)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{bad", "Line 301 is not valid JSON"),
        ('{"colour": "red"}', "row 301"),
        ("[1, 2]", "row 301"),
    ],
)
def test_an_error_after_the_first_rows_blocks_with_its_line(row: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_GOOD * 300 + row + "\n" + _GOOD)
    with pytest.raises(UserError) as raised:
        _look(path)
    assert "rows.jsonl" in raised.value.what and words in raised.value.what
    assert raised.value.fix


def test_skipped_bad_rows_are_warned_of_and_do_not_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_GOOD * 300 + '{bad\n{"color": "red"}\n' + _GOOD)
    result = _look(path, data=Data(bad_rows="skip"))
    assert result.complete
    assert [(warning.title, warning.rows, warning.fix) for warning in result.warnings] == [
        ("Not valid JSON", (301,), "The row is left out."),
        ("Not in the format of the rest", (302,), "The row is left out."),
    ]
    assert result.sizes[0].rows == 303 and result.sizes[0].samples == 301


def test_a_bad_byte_in_the_middle_leaves_out_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\n" + b"a,b\n" * 300 + b"\xe9,b\n" + b"a,b\n" * 699)
    result = _look(path, data=Data(bad_rows="skip"))
    assert (result.sizes[0].rows, result.sizes[0].samples) == (1000, 999)
    with pytest.raises(UserError, match="row 301"):
        _look(path)


def test_the_error_of_a_bad_row_names_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_GOOD * 2 + "{bad\n")
    with pytest.raises(UserError) as raised:
        _look(path)
    assert 'data.bad_rows = "skip"' in raised.value.fix


def test_warnings_do_not_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_GOOD * 3 + '{"prompt": "a", "completion": ""}\n{"prompt": "", "completion": ""}\n')
    result = _look(path)
    assert result.complete and not result.warnings


def test_turns_without_an_answer_are_counted_before_a_run(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    conversations = (["user"], ["user", "assistant"], ["user", "assistant", "user"])
    rows = [{"messages": [{"role": role, "content": "Hi"} for role in roles]} for roles in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (warning,) = _look(path).warnings
    assert (warning.kind, warning.rows) == ("ends-with-user", (1, 3))


def test_checks_skipped_for_time_are_reported_and_do_not_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_GOOD * 300 + "{bad\n")
    assert not _look(path, patience_s=0.0).complete


def test_what_reading_hides_is_warned_of_before_a_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,"5\n' + "a,b\n" * 20 + 'a,b"\n')
    (swallowed,) = _look(path).warnings
    twice = tmp_path / "rows.jsonl"
    twice.write_text(_GOOD + '{"prompt": "a", "completion": "b", "completion": "c"}\n')
    (repeated,) = _look(twice).warnings
    assert (swallowed.kind, repeated.kind, repeated.rows) == ("rows-in-value", "repeated-key", (2,))


def test_a_file_of_which_no_row_is_used_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_GOOD * 3)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 2)
    (warning,) = _look(tmp_path).warnings
    assert (warning.kind, warning.count, warning.path) == ("none-used", 2, str(tmp_path / "b.jsonl"))


def test_what_settings_leave_out_and_cut_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    rated = '{"prompt": "a", "completion": "b", "label": %s}\n'
    path.write_text(rated % "true" * 3 + rated % "false" * 2)
    (left_out,) = _look(path, data=Data(preferences="chosen")).warnings
    assert (left_out.kind, left_out.count, left_out.rows) == ("rated-bad", 2, (4, 5))
    assert left_out.path == str(path) and "'label' is False" in left_out.example
    book = tmp_path / "book.txt"
    book.write_text("fox " * 300 + "\n\nshort\n")
    (cut,) = _look(book, data=Data(max_length=64)).warnings
    assert (cut.kind, cut.rows) == ("long-text", (1,))
    assert "--set data.overflow=split" in cut.fix
    assert not _look(book, data=Data(max_length=64, overflow="split")).warnings
