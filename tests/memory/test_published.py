"""The estimate against published measurements of other people's code paths (a part of the table in use)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bench import estimator
from tests.catalog.configs import CONFIGS

TABLE = Path(__file__).parent / "measured.csv"
NO_FITCHECK = Path("/nonexistent")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return estimator.run(TABLE, CONFIGS, NO_FITCHECK)


def test_every_row_is_placed(result: dict[str, Any]) -> None:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert result["unplaced"] == []
    assert len(result["rows"]) == len(rows)


def test_the_mean_error_is_under_half_a_percent_and_none_is_under_by_three(result: dict[str, Any]) -> None:
    figures = result["summary"]["ours"]
    assert figures["mean_pct"] < 0.5
    assert figures["worst_over_pct"] < 1
    assert figures["worst_under_pct"] > -3


def test_a_run_that_went_out_of_memory_was_not_said_to_fit(result: dict[str, Any]) -> None:
    assert len(result["out_of_memory"]) == 4
    assert all(row["said_it_would_not_fit"] for row in result["out_of_memory"])


def test_a_row_that_cannot_be_placed_is_listed_with_its_reason(tmp_path: Path) -> None:
    lines = TABLE.read_text().splitlines()
    table = tmp_path / "table.csv"
    table.write_text("\n".join((lines[0], lines[1].replace("Qwen/Qwen2.5-1.5B-Instruct", "no/such-model"))))
    result = estimator.run(table, CONFIGS, NO_FITCHECK)
    assert result["rows"] == []
    assert result["unplaced"][0]["why"] == "no config for no/such-model"
