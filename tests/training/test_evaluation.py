"""Exact matches without generating, and when validation rows are compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Evaluated, SampleGenerated
from qlora_tui.runs.view import RunView
from qlora_tui.training.batches import RowShape
from qlora_tui.training.evaluation import compare_validation, exact_answers
from qlora_tui.training.loss import IGNORED
from qlora_tui.training.samples import Sample, SampleList
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of

pytestmark = pytest.mark.slow

END = 9
COLORS = ("red", "blue", "green", "brown")


def exact(predicted: list[int], labels: list[list[int]], segments: list[int] | None) -> tuple[int, int]:
    return exact_answers(torch.tensor(predicted), torch.tensor(labels), segments, frozenset({END}))


def test_an_answer_is_exact_when_every_token_is_most_likely() -> None:
    padded = [[IGNORED, IGNORED, 5, END], [IGNORED, 6, END, IGNORED]]
    assert exact([5, END, 6, END], padded, None) == (2, 2)
    assert exact([5, 4, 6, END], padded, None) == (1, 2)
    packed = [[IGNORED, 5, END, IGNORED, IGNORED, 6, 7, END, IGNORED]]
    assert exact([5, END, 6, 7, END], packed, [3, 5, 1]) == (2, 2)
    assert exact([5, END, 6, 8, END], packed, [3, 5, 1]) == (1, 2)


def test_tokens_after_the_end_of_turn_are_not_counted() -> None:
    assert exact([5, END, 1], [[IGNORED, 5, END, 4]], None) == (1, 1)


def test_the_share_of_exact_answers_is_that_of_greedy_search(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path
) -> None:
    def write(name: str, numbers: range) -> Path:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"what colour is {COLORS[n % 4]} {n}"},
                    {"role": "assistant", "content": COLORS[n % 4]},
                ]
            }
            for n in numbers
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    base = recipe()
    source = msgspec.structs.replace(base.data.sources[0], path=str(write("train.jsonl", range(80))))
    settings = {
        "data.sources": (source,),
        "data.validation_path": str(write("validation.jsonl", range(100, 106))),
        "training.sample_prompts": tuple(f"what colour is {COLORS[n % 4]} {n}" for n in range(100, 106)),
        "training.epochs": 4.0,
        "training.eval_every": 1000,
        "training.learning_rate": 2e-2,
    }
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    wanted = [COLORS[n % 4] for n in range(100, 106)]
    shares = {e.step: e.accuracy for e in events_of(run, Evaluated)}
    for step, share in shares.items():
        answers = [sampled.answer for sampled in events_of(run, SampleGenerated) if sampled.step == step]
        assert share == sum(a == w for a, w in zip(answers, wanted, strict=True)) / 6
    view = RunView(run)
    view.refresh()
    assert view.base_accuracy == 0.0
    assert max(share or 0.0 for share in shares.values()) >= 0.5, shares
    assert "3% of such a short run is not enough time" in run.log_path.read_text()


def test_long_answers_have_no_share(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe({"training.max_steps": 1, "data.validation_fraction": 0.2}))
    assert trainers.run(run) == 0
    assert [e.accuracy for e in events_of(run, Evaluated)] == [None, None]


class Unselected(SampleList):
    """Samples, of which every selection is all."""

    def of_side(self, side: int, /) -> Unselected:
        return self

    def spread(self, most: int) -> Unselected:
        return self


def reported(model: Any, samples: int = 1) -> list[str]:
    """Names and texts that the reporter gets."""
    lines: list[str] = []
    run: Any = SimpleNamespace(
        data=SimpleNamespace(validation=Unselected([Sample([1, 2], [0, 1])] * samples)),
        recipe=Recipe(),
        model=model,
        shape=RowShape(packed=True, max_length=64),
        device=SimpleNamespace(torch_device="cpu"),
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


def test_nothing_is_compared_without_rows() -> None:
    assert reported(None, samples=0) == []
