from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.data.dataset_report import LengthCounter, Report
from qlora_tui.data.inspection import inspect, inspecting, show
from qlora_tui.data.read import row_at, rows
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from tests.data.families import family, tokenizer_json


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"q {n}?", "completion": f"answer {n} " + "x" * (n % 7)} for n in range(count)]


def write(path: Path, values: list[Any]) -> Source:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return Source(path=str(path))


def test_a_report_says_format_counts_and_lengths(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*pairs(30), {"prompt": "x", "completion": ""}])
    report = inspect(source, family("chatml"))
    (file,) = report.files
    assert (file.format, file.columns) == (
        "prompt-completion",
        {"prompt": "prompt", "completion": "completion"},
    )
    assert file.bytes == Path(source.path).stat().st_size
    assert report.complete
    assert report.share == 1.0
    assert (report.counts.rows, report.counts.samples, report.counts.left_out) == (31, 30, 1)
    assert 0 < report.counts.trained_tokens < report.counts.tokens
    assert report.lengths.unit == "tokens"
    assert report.lengths.count == 30
    assert report.lengths.p50 <= report.lengths.p90 <= report.lengths.p99 <= report.lengths.longest
    assert sum(bin_.count for bin_ in report.lengths.histogram) == 30
    assert [(p.kind, p.rows) for p in report.problems] == [("empty-row", (31,))]
    assert report.template == "tokenizer"


def test_a_report_goes_through_json_and_back(tmp_path: Path) -> None:
    report = inspect(write(tmp_path / "a.jsonl", pairs(30)), family("chatml"))
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_without_a_tokenizer_lengths_are_in_characters(tmp_path: Path) -> None:
    report = inspect(write(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "de"}]))
    assert (report.lengths.unit, report.lengths.longest) == ("characters", 5)
    assert (report.counts.conversations, report.counts.tokens, report.template) == (1, 0, "")


def test_a_folder_reports_each_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3))
    (tmp_path / "b.csv").write_text("question,answer\nq,a\n")
    report = inspect(Source(path=str(tmp_path)))
    assert [file.format for file in report.files] == ["prompt-completion", "question-answer"]
    assert report.counts.rows == 4


def test_problems_and_rows_of_a_folder_belong_to_their_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3))
    second = write(
        tmp_path / "b.jsonl", [{"prompt": "other", "completion": "z"}, {"prompt": "", "completion": "y"}]
    )
    source = Source(path=str(tmp_path))
    (problem,) = inspect(source, family("chatml")).problems
    assert (problem.path, problem.rows) == (second.path, (2,))
    assert "other" in show(source, 1, family("chatml"), path=second.path).samples[0][1].text
    assert "q 0" in show(source, 1, family("chatml")).samples[0][1].text


def test_an_unusable_file_raises_before_the_first_report(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("never\n" * 300)
    with pytest.raises(UserError, match="Not valid JSON") as caught:
        next(inspecting(Source(path=str(path))))
    assert "Line 1" in caught.value.what


def test_bad_rows_do_not_stop_a_report(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 6 + "{oops\n" + '{"text": "b"}\n')
    report = inspect(Source(path=str(path)), family("chatml"))
    problem = next(p for p in report.problems if p.severity == "error")
    assert (problem.kind, problem.rows) == ("bad-json", (7,))
    assert report.counts.samples == 7


def test_a_row_is_shown_as_the_model_will_see_it(tmp_path: Path) -> None:
    shown = show(write(tmp_path / "a.jsonl", pairs(9)), 4, family("chatml"))
    (sample,) = shown.samples
    assert "".join(piece.text for piece in sample) == (
        "<|im_start|>user\nq 3?<|im_end|>\n<|im_start|>assistant\nanswer 3 xxx<|im_end|>\n"
    )
    assert [piece.text for piece in sample if piece.in_loss] == ["answer 3 xxx", "<|im_end|>", "\n"]
    assert shown.token_counts[0] == family("chatml").encode("".join(p.text for p in sample)).__len__()


def test_a_cut_row_and_a_rejected_row_are_shown(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"prompt": "x", "completion": "word " * 99}, {"prompt": "", "completion": "y"}]
    )
    cut = show(source, 1, family("chatml"), Data(max_length=32))
    assert sum(len(family("chatml").encode(p.text)) for p in cut.samples[0]) == 32
    assert cut.token_counts[0] > 32
    refused = show(source, 2, family("chatml"))
    assert (refused.samples, refused.refused) == ((), "The prompt is empty.")


def test_any_line_of_a_large_file_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    lines = [json.dumps({"text": "é" * (n % 700), "n": n}, ensure_ascii=n % 2 == 0) for n in range(9000)]
    lines[10] = lines[4444] = ""
    path.write_text("\ufeff" + "\n".join(lines))
    assert path.stat().st_size > 5_000_000
    reference = {row.number: row for row in rows(path)}
    for number in (1, 2, 12, 1500, 4444, 8999, 9000):
        assert row_at(path, number) == reference[number]
    assert row_at(path, 11) == reference[12]
    assert row_at(path, 4445) == reference[4446]
    assert row_at(path, 9001) is None


def test_a_changed_file_is_looked_up_anew(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "x" * 1000})
    path.write_text((line + "\n") * 5000)
    assert row_at(path, 5001) is None
    path.write_text((line + "\n") * 5001)
    assert row_at(path, 5001) is not None


@pytest.mark.slow
def test_a_large_file_reports_at_once_and_while_read(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    block = "".join(json.dumps({"prompt": f"q {n}", "completion": "word " * 40}) + "\n" for n in range(2000))
    with path.open("w") as file:
        for _ in range(150):
            file.write(block)
    reports = inspecting(Source(path=str(path)), family("chatml"))
    first = next(reports)
    assert not first.complete
    assert 0 < first.counts.rows <= 32
    assert next(reports).counts.rows > first.counts.rows
    reports.close()  # type: ignore[attr-defined]  # a generator


def test_lengths_are_ranked_exactly() -> None:
    counter = LengthCounter("tokens")
    for row, length in enumerate(range(1, 101), 1):
        counter.add([length], row)
    summary = counter.summary()
    assert (summary.p50, summary.p90, summary.p99, summary.longest, summary.longest_row) == (
        50,
        90,
        99,
        100,
        100,
    )
    assert counter.above(90) == 10
    assert summary.histogram[0].up_to == 5
    assert LengthCounter("tokens").summary().count == 0


def test_the_data_screen_needs_no_tokenizer_library() -> None:
    code = (
        "import sys, qlora_tui.data.dataset_report as r;"
        "print({'tokenizers', 'jinja2', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_row_of_any_file_in_a_folder_is_shown(tmp_path: Path) -> None:
    for name, first in (("a", 1), ("b", 10)):
        rows = [{"prompt": "Which?", "completion": f"number {first + n}"} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = str(tmp_path / "b.jsonl")
    shown = show(Source(path=str(tmp_path)), 2, family("chatml"), path=second)
    assert shown.path == second
    assert "number 11" in "".join(piece.text for piece in shown.samples[0])
    assert show(Source(path=str(tmp_path)), 1, family("chatml")).path == str(tmp_path / "a.jsonl")
    assert [file.last_row for file in inspect(Source(path=str(tmp_path))).files] == [3, 3]


@pytest.mark.parametrize(
    ("max_length", "words", "reported"), [(64, 60, True), (32, 60, False), (64, 3, False)]
)
def test_samples_beyond_the_context_of_the_model_are_told(
    tmp_path: Path, max_length: int, words: int, reported: bool
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text(tokenizer_json())
    config = {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    (model / "config.json").write_text(json.dumps(config))
    source = write(tmp_path / "a.jsonl", [*pairs(3), {"prompt": "q", "completion": "dog " * words}])
    report = inspect(source, ChatTokenizer.from_folder(model), Data(max_length=max_length))
    problems = [problem for problem in report.problems if problem.kind == "beyond-context"]
    assert [problem.count for problem in problems] == ([1] if reported else [])
