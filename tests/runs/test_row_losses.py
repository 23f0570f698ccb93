"""Classes and order of training rows by their losses, and the files that hold them.

Jobs that measure a run, and what is said if they leave no result.
"""

from __future__ import annotations

import pytest

from qlora_tui.data.excluded_rows import RowPlace
from qlora_tui.data.repetition import find_contradictions
from qlora_tui.errors import UserError
from qlora_tui.runs import actions
from qlora_tui.runs.damage import WEIGHTS
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measuring
from qlora_tui.runs.row_losses import (
    MeasuredRow,
    classify,
    measure_row_losses,
    read_row_losses,
    token_changes,
    write_row_losses,
)
from qlora_tui.runs.task_metrics.task_evaluation import evaluate_task


def a_row(
    row: int, before: float, after: float, other_prompt: float, contradicts: int | None = None
) -> MeasuredRow:
    return MeasuredRow(
        source=0,
        row=row,
        before=(before, before),
        after=(after - 0.01, after + 0.01),
        other_prompt=other_prompt,
        contradicts=contradicts,
    )


ROWS = [
    a_row(1, 3.0, 1.0, 3.0),
    a_row(2, 3.0, 1.2, 2.9),
    a_row(3, 4.0, 3.0, 2.9),  # its answer fits another prompt better
    a_row(4, 2.0, 0.05, 2.5),
    a_row(5, 3.0, 1.5, 3.1, contradicts=1),
]


def test_rows_are_classed_and_the_wrong_one_is_first() -> None:
    losses, _ = classify("a-run", ROWS, 1.0)
    assert [row.row for row in losses.rows] == [3, 5, 2, 1, 4]
    assert {row.row: row.row_class for row in losses.rows} == {
        1: "learned",
        2: "learned",
        3: "never learned",
        4: "memorized",
        5: "contradicting",
    }
    assert losses.counts() == {"never learned": 1, "contradicting": 1, "memorized": 1, "learned": 2}


def test_no_row_is_unlearned_where_prompts_help_nowhere() -> None:
    losses, _ = classify("a-run", [a_row(n, 3.0, 2.0, 2.0 - 0.01 * n) for n in range(5)], 1.0)
    assert losses.counts()["never learned"] == 0


def test_rows_and_their_tokens_are_read_back(run: RunDir) -> None:
    assert read_row_losses(run) is None
    losses, tokens = classify("a-run", ROWS, 1.0)
    write_row_losses(run, losses, tokens)
    assert read_row_losses(run) == losses
    row = losses.row_of(0, RowPlace("", 3))
    assert row is not None and losses.row_of(1, RowPlace("", 3)) is None
    before, after = zip(*token_changes(run, row), strict=True)
    assert before == (4.0, 4.0) and after == pytest.approx((2.99, 3.01))
    run.row_losses_path.with_suffix(".f32").write_bytes(b"\0" * 20)
    assert token_changes(run, row) == ()
    run.row_losses_path.write_text("{")
    assert read_row_losses(run) is None


def test_contradictions_have_one_prompt_and_far_answers() -> None:
    rows = [
        ("What is the tallest mountain on Earth, and where is it?", "Mount Everest, in Nepal and China."),
        ("What is a spoon?", "A small bowl with a handle."),
        ("what is the tallest mountain on earth and where is it", "K2 lies across Pakistan."),
        ("What is the tallest mountain on Earth, and where is it?", "In Nepal and China: Mount Everest."),
        ("What is a fork?", "It has tines."),
    ]
    assert find_contradictions(rows) == {0: 2, 2: 0, 3: 2}


@pytest.fixture
def trained(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("qlora_tui.gpu.torch_env.configure_torch_env", lambda variables: None)
    with pytest.raises(UserError, match="The run has no adapter"), measuring(run.path):
        pass
    run.adapter_dir.mkdir()
    (run.adapter_dir / WEIGHTS).touch()
    return run


def test_a_run_is_not_deleted_while_it_is_measured(trained: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_tui.runs.measuring.PATIENCE_S", 0.0)
    run = trained
    with measuring(run.path):
        with pytest.raises(UserError, match="is being measured"):
            actions.check_deletable(run)
        with pytest.raises(UserError, match="is being trained or measured"), measuring(run.path):
            pass


def test_a_gpu_that_fails_is_reported_in_words(trained: RunDir) -> None:
    with pytest.raises(UserError, match="The GPU stopped computing"), measuring(trained.path):
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_a_process_that_leaves_no_result_is_an_error(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_tui.runs.measuring.run_job", lambda *arguments, **options: None)
    with pytest.raises(UserError, match="cannot be read"):
        evaluate_task(run)
    with pytest.raises(UserError, match="cannot be read"):
        measure_row_losses(run)
