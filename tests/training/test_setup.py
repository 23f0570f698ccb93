"""What the setup of a run reads, chooses and says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.training import setup

pytestmark = pytest.mark.slow


def ignore(*_: object) -> None:
    """Of a reporter."""


def test_every_process_takes_what_the_first_chose_from_the_least_memory() -> None:
    asked: list[tuple[int, int]] = []
    first = Recipe(training=Training(micro_batch_size=4, gradient_accumulation=2, optimizer="adamw"))

    def choose(recipe: Recipe, longest: int, free_bytes: int, **settings: Any) -> Recipe:
        asked.append((free_bytes, settings["processes"]))
        return recipe

    run: Any = SimpleNamespace(
        recipe=Recipe(),
        data=SimpleNamespace(train=SimpleNamespace(lengths=lambda: [5, 9])),
        meter=SimpleNamespace(free_bytes=lambda: 24, choose_step=choose, set_recipe=ignore),
        dist=SimpleNamespace(
            all_gather=lambda value: [value, 12], broadcast=lambda value: first, world_size=2
        ),
        reporter=SimpleNamespace(emit=ignore),
        has_run_out=False,
    )
    setup._choose_step(run)
    assert run.recipe.training == first.training
    assert asked == [(12, 2)]
