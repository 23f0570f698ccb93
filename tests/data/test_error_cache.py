"""An error that an inspection has met refuses a launch, as long as it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data import quick_check
from qlora_tui.data.inspection import inspect, inspecting
from qlora_tui.data.problems import ProblemCounter
from qlora_tui.data.quick_check import (
    cache_errors,
    file_fingerprint,
    raise_cached_error,
    tokenizer_fingerprint,
)
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from tests.data.families import NO_TURN_END, tokenizer_json

GOOD = '{"prompt": "a", "completion": "b"}\n'


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
        patch.setattr(quick_check, "_READING", quick_check._READING + 1)
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
