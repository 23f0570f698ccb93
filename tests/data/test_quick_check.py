"""Rows that block a run, and errors of earlier inspections, refuse a launch before it is queued."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data import quick_check as checks
from qlora_tui.data.inspection import inspect, inspecting, show
from qlora_tui.data.problems import ProblemCounter
from qlora_tui.data.quick_check import (
    QuickCheckResult,
    cache_errors,
    file_fingerprint,
    quick_check,
    raise_cached_error,
    tokenizer_fingerprint,
)
from qlora_tui.data.sources import open_source
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from tests.data.families import NO_TURN_END, family, tokenizer_json

GOOD = '{"prompt": "a", "completion": "b"}\n'


def _look(path: Path, patience_s: float = 60.0, data: Data | None = None) -> QuickCheckResult:
    data = data or Data()
    return quick_check(open_source(Source(path=str(path)), data.preferences)[0], data, patience_s)


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
    path.write_text(GOOD * 300 + row + "\n" + GOOD)
    with pytest.raises(UserError) as raised:
        _look(path)
    assert "rows.jsonl" in raised.value.what and words in raised.value.what
    assert raised.value.fix


def test_skipped_bad_rows_are_warned_of_and_do_not_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 300 + '{bad\n{"color": "red"}\n' + GOOD)
    result = _look(path, data=Data(bad_rows="skip"))
    assert result.complete
    assert [(warning.title, warning.rows, warning.fix) for warning in result.warnings] == [
        ("Not valid JSON", (301,), "The row is left out."),
        ("Not in the format of the other rows", (302,), "The row is left out."),
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
    path.write_text(GOOD * 2 + "{bad\n")
    with pytest.raises(UserError) as raised:
        _look(path)
    assert 'data.bad_rows = "skip"' in raised.value.fix


def test_warnings_do_not_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 3 + '{"prompt": "a", "completion": ""}\n{"prompt": "", "completion": ""}\n')
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
    path.write_text(GOOD * 300 + "{bad\n")
    assert not _look(path, patience_s=0.0).complete


def test_what_reading_hides_is_warned_of_before_a_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,"5\n' + "a,b\n" * 20 + 'a,b"\n')
    (swallowed,) = _look(path).warnings
    twice = tmp_path / "rows.jsonl"
    twice.write_text(GOOD + '{"prompt": "a", "completion": "b", "completion": "c"}\n')
    (repeated,) = _look(twice).warnings
    assert (swallowed.kind, repeated.kind, repeated.rows) == ("rows-in-value", "repeated-key", (2,))
    shown = show(Source(path=str(twice)), 2, family("chatml"))
    assert [kind for kind, _ in shown.findings] == ["repeated-key"]


def test_a_file_of_which_no_row_is_used_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 3)
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with an error far down."""
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD * 400 + "{bad\n" + GOOD)
    return file


def test_what_was_found_is_refused_as_long_as_it_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(path=str(path))
    raise_cached_error([(source, path)])
    inspect(source)
    with pytest.raises(UserError) as raised:
        raise_cached_error([(source, path)])
    assert "row 401" in raised.value.what and raised.value.fix
    raise_cached_error([(Source(path=str(path), format="prompt-completion"), path)])
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_READING", checks._READING + 1)
        raise_cached_error([(source, path)])
    path.write_text(GOOD * 402)
    raise_cached_error([(source, path)])


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_a_file_that_ends_early_is_refused_before_a_launch(tmp_path: Path, bad_rows: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(GOOD * 400 + "{bad\n" + GOOD)
    source, skips = Source(path=str(path)), bad_rows == "skip"
    with pytest.raises(UserError, match="Line 401"):
        inspect(source, data=Data(bad_rows=bad_rows))
    with pytest.raises(UserError, match="Line 401"):
        raise_cached_error([(source, path)], skips_bad_rows=skips)
    path.write_text(GOOD * 402)
    raise_cached_error([(source, path)], skips_bad_rows=skips)


def test_errors_are_cached_apart_from_those_with_bad_rows_skipped(path: Path) -> None:
    source = Source(path=str(path))
    inspect(source)
    raise_cached_error([(source, path)], skips_bad_rows=True)
    report = inspect(source, data=Data(bad_rows="skip"))
    assert [problem.severity for problem in report.problems if problem.kind == "bad-json"] == ["warning"]
    with pytest.raises(UserError):
        raise_cached_error([(source, path)])


def test_a_name_that_is_not_utf8_is_inspected_too(path: Path) -> None:
    source = Source(path=str(path.with_name("rows\udcff.jsonl")))
    odd = path.rename(source.path)
    tokens = tokenizer_fingerprint(path.with_name("model\udcff"), "", "answers")
    assert 401 in inspect(source).problems[0].rows
    raise_cached_error([(source, odd)], tokens)


def test_a_file_repaired_while_it_is_read_is_accepted(path: Path) -> None:
    source = Source(path=str(path))
    reports = inspecting(source)
    next(reports)
    mended = path.with_suffix(".new")
    mended.write_text(GOOD * 402)
    mended.replace(path)
    list(reports)
    raise_cached_error([(source, path)])


def test_what_is_no_longer_found_is_forgotten(path: Path) -> None:
    source = Source(path=str(path))
    tally = ProblemCounter(0, str(path))
    tally.add("bad-row", 3, "of an older reader")
    cache_errors(source, path, file_fingerprint(path), tally.problems(), None, read=True)
    cache_errors(source, path, file_fingerprint(path), [], None, read=False)
    with pytest.raises(UserError):
        raise_cached_error([(source, path)])
    cache_errors(source, path, file_fingerprint(path), [], None, read=True)
    raise_cached_error([(source, path)])


def test_warnings_are_no_errors(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD * 3 + '{"prompt": "a", "completion": ""}\n')
    assert inspect(Source(path=str(file))).problems
    raise_cached_error([(Source(path=str(file)), file)])


def test_a_token_error_applies_only_to_its_tokenizer_and_template(tmp_path: Path) -> None:
    path, model = tmp_path / "rows.jsonl", tmp_path / "model"
    path.write_text(GOOD * 3)
    model.mkdir()
    (model / "tokenizer.json").write_text(tokenizer_json())
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": NO_TURN_END}))
    source, files = Source(path=str(path)), [(Source(path=str(path)), path)]
    report = inspect(source, ChatTokenizer.from_folder(model), Data())
    assert [problem.kind for problem in report.problems if problem.severity == "error"] == [
        "turn-end-untrained"
    ]
    with pytest.raises(UserError):
        raise_cached_error(files, tokenizer_fingerprint(model, "auto", "assistant"))
    raise_cached_error(files)
    raise_cached_error(files, tokenizer_fingerprint(model, "chatml", "assistant"))
    raise_cached_error(files, tokenizer_fingerprint(model, "auto", "everything"))
    os.utime(model / "tokenizer_config.json", (1, 1))
    raise_cached_error(files, tokenizer_fingerprint(model, "auto", "assistant"))
