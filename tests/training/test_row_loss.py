"""The loss of each training row: equal to the model's own, and measured for a run by its command."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from qlora_tui.cli import main
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.row_losses import read_row_losses, token_changes
from qlora_tui.runs.view import RunView
from qlora_tui.training.batches import RowShape
from qlora_tui.training.row_losses import OtherPrompts
from qlora_tui.training.samples import SampleList
from qlora_tui.training.scoring import token_losses
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe

pytestmark = pytest.mark.slow


class TwoTurns:
    """Three samples; of the last, two stretches are in the loss."""

    ids: tuple[tuple[int, ...], ...] = ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16))
    masks: tuple[tuple[int, ...], ...] = ((0, 0, 1, 1), (0, 1, 1), (0, 0, 1, 0, 1))

    def __len__(self) -> int:
        return 3

    def token_ids(self, i: int, /) -> tuple[int, ...]:
        return self.ids[i]

    def loss_mask(self, i: int, /) -> tuple[int, ...]:
        return self.masks[i]

    def weights(self, i: int, /) -> None:
        return None

    def length(self, i: int, /) -> int:
        return len(self.ids[i])

    def epoch(self, epoch: int, seed: int, /) -> array[int]:
        return array("I", range(3))


def test_an_answer_follows_the_next_samples_prompt() -> None:
    others = SampleList(OtherPrompts(TwoTurns(), max_length=4))
    assert [others.token_ids(i) for i in range(3)] == [[9, 7, 8], [12, 13, 10, 11], [6, 14, 15, 16]]
    assert [others.loss_mask(i) for i in range(3)] == [[0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]]


class Chats(TwoTurns):
    """Two conversations of two turns, and a question between them."""

    ids = ((1, 2, 3, 4, 5), (6, 7), (11, 12, 13, 14, 15, 16))
    masks = ((0, 1, 0, 0, 1), (0, 1), (0, 0, 1, 0, 1, 0))


def test_later_answers_follow_later_prompts_of_others() -> None:
    others = SampleList(OtherPrompts(Chats(), max_length=9))
    assert [others.token_ids(i) for i in range(3)] == [[6, 2, 14, 5], [11, 12, 7], [1, 13, 3, 4, 15]]
    assert [others.loss_mask(i) for i in range(3)] == [[0, 1, 0, 1], [0, 0, 1], [0, 1, 0, 0, 1]]
    assert SampleList(OtherPrompts(Chats(), max_length=3)).token_ids(2) == [13, 3, 4]


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(target_modules="all-linear"))


def test_token_losses_are_those_of_the_whole_logits(adapted: Any) -> None:
    losses = token_losses(adapted, TwoTurns(), RowShape(packed=False, max_length=8), torch.device("cpu"))
    assert [len(row) for row in losses] == [2, 2, 2]
    for number, row in enumerate(losses):
        ids, mask = torch.tensor([TwoTurns.ids[number]]), TwoTurns.masks[number]
        with torch.no_grad():
            log_probs = adapted(input_ids=ids).logits[0].log_softmax(-1)
        expected = [-float(log_probs[t - 1, ids[0, t]]) for t in range(1, ids.shape[1]) if mask[t]]
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("quick_trainers")
def test_blame_measures_each_row_of_a_run(
    recipe: MakeRecipe, trainers: Trainers, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(recipe({"training.learning_rate": 3e-2, "training.epochs": 8.0}))
    assert trainers.run(run) == 0
    view = RunView(run)
    view.refresh()
    compared = view.validation_change
    assert compared is not None and compared.rows == 3
    assert compared.before == pytest.approx(view.loss_before_training, abs=1e-3)
    assert compared.after == pytest.approx(view.evaluations[-1].loss, abs=1e-3)
    assert compared.low is not None and compared.high is not None
    assert compared.low <= compared.after - compared.before <= compared.high < 0
    assert main(["data", "blame", run.id, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    losses = read_row_losses(run)
    assert losses is not None and len(losses.rows) == len(printed["rows"]) == 27
    assert sum(row.after < row.before for row in losses.rows) > 25
    first = losses.rows[0]
    changes = token_changes(run, first)
    assert sum(after for _, after in changes) / first.tokens == pytest.approx(first.after, abs=1e-4)
    assert main(["data", "blame", run.id, "--rows", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
