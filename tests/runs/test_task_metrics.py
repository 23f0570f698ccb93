"""Intervals against published figures, metrics by kind of answer, and the file of an evaluation."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from qlora_tui.checksums import digest, write_checksums
from qlora_tui.data.conversation import ToolCall
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.answer_metrics import (
    fits_tools,
    is_json,
    match_answers,
    measure_answers,
    same_json,
    same_words,
    token_f1,
)
from qlora_tui.runs.task_metrics.intervals import (
    mcnemar_p,
    mean_interval,
    paired_share_interval,
    share_interval,
)
from qlora_tui.runs.task_metrics.task_evaluation import (
    LossChange,
    describe_loss,
    describe_metric,
    read_task_evaluation,
    write_task_evaluation,
)
from tests.support.task_evaluations import a_row, put_evaluation

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {}, "day": {}}, "required": ["city"]},
    },
}


def pairs(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Outcomes of two models on the same rows, by what the first and the second got right."""
    cells = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained
    cells += [(False, False)] * neither
    return [first for first, _ in cells], [second for _, second in cells]


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_shares_have_wilsons_interval(successes: int, total: int, expected: tuple[float, float]) -> None:
    assert share_interval(successes, total) == pytest.approx(expected, abs=5e-5)


def test_paired_shares_have_newcombes_interval() -> None:
    # Newcombe 1998, paired data, table II: 36, 12, 2, 0.
    first, second = pairs(36, 2, 12, 0)
    assert paired_share_interval(first, second) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired_share_interval(second, first)
    assert (low, high) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_mcnemar_counts_only_rows_that_changed() -> None:
    assert mcnemar_p(*pairs(50, 0, 6, 50)) == pytest.approx(2 / 2**6)
    assert mcnemar_p(*pairs(0, 1, 4, 0)) == pytest.approx(2 * 6 / 32)
    assert mcnemar_p(*pairs(9, 0, 0, 9)) == 1.0


@pytest.mark.slow
def test_intervals_of_few_means_cover_the_truth() -> None:
    draw = random.Random(5)
    samples = [[draw.gauss(0, 1) for _ in range(8)] for _ in range(60)]
    covered = sum(low <= 0 <= high for low, high in map(mean_interval, samples))
    assert 54 <= covered <= 60
    weighted = mean_interval([0.0, 1.0] * 30, [1.0, 3.0] * 30)
    assert weighted.low < 0.75 < weighted.high and weighted.high - weighted.low < 0.3


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The cat sat.", "the cat sat", 1.0),
        ("cat", "a cat sat down", 0.4),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_is_squads(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_equal_answers_may_differ_in_form_only() -> None:
    assert same_words("**Positive**.", "positive") and not same_words("not positive", "positive")
    assert same_words("!", "!") and not same_words("!", "?")
    assert same_json('```json\n{"a": 1, "b": [2]}\n```', '{"b": [2], "a": 1}')
    assert not same_json('{"a": NaN}', '{"a": NaN}') and not same_json('Sure: {"a": 1}', '{"a": 1}')


@pytest.mark.parametrize(
    ("name", "arguments", "fits"),
    [
        ("weather", {"city": "Oslo"}, True),
        ("weather", {"day": "today"}, False),
        ("weather", "Oslo", False),
        ("forecast", {"city": "Oslo"}, False),
    ],
)
def test_calls_fit_the_tools_offered(name: str, arguments: Any, fits: bool) -> None:
    assert fits_tools(ToolCall(name, arguments), (WEATHER,)) is fits


def test_a_tool_that_allows_no_more_arguments_gets_none() -> None:
    parameters = {"properties": {"city": {}}, "additionalProperties": False}
    closed: dict[str, Any] = {"name": "weather", "parameters": parameters}
    assert fits_tools(ToolCall("weather", {"city": "Oslo"}), (closed,))
    assert not fits_tools(ToolCall("weather", {"city": "Oslo", "hour": 3}), (closed,))
    assert fits_tools(ToolCall("weather", {"hour": 3}), (WEATHER | {"function": 1}, {"name": "weather"}))


def test_answers_nested_too_deeply_are_no_json() -> None:
    assert not is_json("[" * 9999 + "]" * 9999)


@pytest.mark.parametrize(
    ("references", "names"),
    [
        ([f"town {number}" for number in range(9)], ["exact match", "token F1", "ended"]),
        (
            [f"a long answer with many words and the number {number}" for number in range(9)],
            ["token F1", "ended"],
        ),
        ([f'{{"number": {number}}}' for number in range(9)], ["valid JSON", "exact match", "ended"]),
    ],
)
def test_metrics_follow_what_references_look_like(references: list[str], names: list[str]) -> None:
    metrics = measure_answers([a_row(text, "no", text) for text in references])
    assert [metric.name for metric in metrics] == names
    assert all(metric.adapter == 1.0 for metric in metrics)
    assert {metric.comparison for metric in metrics[:-1]} == {"better"}
    # Another answer than a free text can be right too.
    is_free = names[0] == "token F1"
    assert (
        match_answers([a_row(references[0], "no", references[0])] * 2)
        == [(None if is_free else False, True)] * 2
    )


def test_tool_calls_are_valid_or_not() -> None:
    right, other = (ToolCall("weather", {"city": city}) for city in ("Oslo", "Bergen"))
    row = a_row("", "Rain.", "", tools=(WEATHER,), reference_calls=(right,), adapter_calls=(other,))
    metrics = measure_answers([row] * 7)
    assert [(metric.name, metric.base, metric.adapter) for metric in metrics[:2]] == [
        ("valid tool calls", 0.0, 1.0),
        ("exact match", 0.0, 0.0),
    ]
    assert match_answers([row]) == [(False, False)]


@pytest.mark.parametrize(
    ("count", "base", "adapter", "comparison"),
    [
        (5, "no", "yes", "unclear"),
        (6, "no", "yes", "better"),
        (6, "yes", "no", "worse"),
        (40, "no", "no", "unclear"),
    ],
)
def test_few_prompts_and_equal_answers_prove_nothing(
    count: int, base: str, adapter: str, comparison: str
) -> None:
    rows = [a_row("yes", base, adapter) for _ in range(count)]
    metric = measure_answers(rows)[0]
    assert metric.comparison == comparison
    words = describe_metric(metric)
    assert ("too few to tell" in words) == (count == 5)
    assert ("not enough evidence" in words) == (count == 40)


def test_a_loss_change_is_weighted_by_tokens() -> None:
    loss = LossChange.of([30.0, 2.0] * 4, [20.0, 2.0] * 4, [10, 1] * 4)
    assert (loss.rows, loss.before, loss.after) == pytest.approx((8, 32 / 11, 2.0))
    assert loss.is_lower and not loss.is_higher
    assert describe_loss(loss, "validation loss").startswith(
        "validation loss 2.909 → 2.000 on 8 rows (95% interval"
    )
    assert LossChange.of([1.0], [float("nan")], [1]).rows == 0
    assert LossChange.of([1.0], [0.5], [1]).interval is None
    assert not LossChange.of([1.0, 2.0] * 8, [2.0, 1.0] * 8, [1] * 16).is_lower


def test_an_evaluation_of_another_adapter_does_not_count(run: RunDir) -> None:
    assert read_task_evaluation(run) is None
    evaluation = put_evaluation(run, [a_row("yes", "no", "yes")], LossChange.of([1.0], [0.5], [1]))
    assert read_task_evaluation(run) == evaluation
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"other weights")
    assert read_task_evaluation(run) is None
    write_checksums(run.adapter_dir)
    write_task_evaluation(run, msgspec.structs.replace(evaluation, adapter=digest(run.adapter_dir)))
    assert read_task_evaluation(run) is not None
    # Of the same size.
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"still weights")
    write_checksums(run.adapter_dir)
    assert read_task_evaluation(run) is None
    run.task_evaluation_path.write_bytes(msgspec.json.encode(evaluation)[:-1])
    assert read_task_evaluation(run) is None
