"""Plain text longer than a row: what is lost is said, with the rows that splitting makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.inspection import inspect
from qlora_tui.recipe.schema import Data, Recipe, Source
from tests.data.families import family


def texts(path: Path, *lengths: int) -> Source:
    path.write_text("\n\n".join(" ".join(f"w{n % 7}" for n in range(length)) for length in lengths) + "\n")
    return Source(path=str(path))


@pytest.mark.parametrize("too_long", ["cut-right", "cut-left", "drop"])
def test_a_long_text_names_the_rows_that_splitting_makes(
    private_home: Path, tmp_path: Path, too_long: Any
) -> None:
    source = texts(tmp_path / "book.txt", 500, 20, 300)
    tokenizer = family("chatml")
    report = inspect(source, tokenizer, Data(max_length=64, overflow=too_long))
    (problem,) = (p for p in report.problems if p.kind == "long-text")
    assert (problem.count, problem.rows, problem.severity) == (2, (1, 5), "warning")
    assert f'data.overflow = "{too_long}"' in problem.example
    assert "data.overflow=split" in problem.fix
    assert not {"too-long", "nothing-left"} & {p.kind for p in report.problems}
    short = 1
    split = Data(sources=(source,), max_length=64, overflow="split", validation_fraction=0)
    assert problem.split_rows + short == len(prepare_dataset(Recipe(data=split), tokenizer).train)


def test_what_stays_of_a_text_is_counted_in_tokens(tmp_path: Path) -> None:
    source = texts(tmp_path / "book.txt", 500)
    tokenizer = family("chatml")
    whole = len(tokenizer.encode(Path(source.path).read_text().strip())) + 1
    problem = next(
        p for p in inspect(source, tokenizer, Data(max_length=64)).problems if p.kind == "long-text"
    )
    assert problem.example == (
        f'data.overflow = "cut-right" keeps the first 64 of {whole:,} tokens; splitting makes '
        f"{-(-whole // 64)} rows of them."
    )


def test_split_texts_and_texts_that_fit_are_no_problem(tmp_path: Path) -> None:
    source = texts(tmp_path / "book.txt", 500)
    for data in (Data(max_length=64, overflow="split"), Data(max_length=4096)):
        kinds = {p.kind for p in inspect(source, family("chatml"), data).problems}
        assert not kinds & {"long-text", "too-long", "nothing-left"}


def test_without_a_tokenizer_the_rows_of_a_split_are_estimated(tmp_path: Path) -> None:
    source = texts(tmp_path / "book.txt", 500)
    characters = len(Path(source.path).read_text().strip())
    rows = -(-characters // (4 * 64))
    problem = next(p for p in inspect(source, None, Data(max_length=64)).problems if p.kind == "long-text")
    assert f"One text holds {characters:,} characters" in problem.example
    assert f"about {rows} rows of them (an estimate" in problem.example
    assert (problem.split_rows, problem.is_estimate) == (rows, True)
    assert "long-text" not in {p.kind for p in inspect(source, None, Data(max_length=1024)).problems}


@pytest.mark.parametrize("too_long", ["cut-right", "split"])
@pytest.mark.parametrize("model", ["", "chatml"])
def test_one_long_text_is_not_reported_as_only_one_row(tmp_path: Path, too_long: Any, model: str) -> None:
    tokenizer = family(model) if model else None
    for words, expected in ((500, False), (3, True)):
        source = texts(tmp_path / "book.txt", words)
        report = inspect(source, tokenizer, Data(max_length=64, overflow=too_long))
        assert ("one-row" in {p.kind for p in report.problems}) is expected


def test_a_long_conversation_is_no_long_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nq," + "word " * 200 + "\n")
    kinds = {p.kind for p in inspect(Source(path=str(path)), family("chatml"), Data(max_length=64)).problems}
    assert "too-long" in kinds
    assert "long-text" not in kinds
