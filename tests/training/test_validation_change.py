"""When validation rows are not compared with what they were before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from qlora_tui.data.store import GOOD
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.batches import RowShape
from qlora_tui.training.evaluation import compare_validation
from tests.training.preference_data import TokenLists

pytestmark = pytest.mark.slow


class Unselected(TokenLists):
    """Samples, of which every selection is all."""

    def of_side(self, side: int, /) -> Unselected:
        return self

    def spread(self, most: int) -> Unselected:
        return self


def reported(model: Any, samples: int = 1, world_size: int = 1) -> list[str]:
    """Names and texts that the reporter gets."""
    lines: list[str] = []
    run: Any = SimpleNamespace(
        data=SimpleNamespace(validation=Unselected([([1, 2], 1, GOOD)] * samples)),
        recipe=Recipe(),
        model=model,
        shape=RowShape(packed=True, max_length=64),
        device=SimpleNamespace(torch_device="cpu"),
        dist=SimpleNamespace(world_size=world_size),
        reporter=SimpleNamespace(phase=lambda phase, detail: lines.append(phase), log=lines.append),
    )
    compare_validation(run)
    return lines


def test_an_error_costs_the_comparison_and_not_the_run() -> None:
    class FailingModel:
        @property
        def training(self) -> bool:
            raise RuntimeError("out of memory")

    lines = ["evaluating", "the validation rows were not compared: RuntimeError: out of memory"]
    assert reported(FailingModel()) == lines


@pytest.mark.parametrize("settings", [{"world_size": 2}, {"samples": 0}])
def test_nothing_is_compared_without_rows_or_across_processes(settings: dict[str, int]) -> None:
    assert reported(None, **settings) == []
