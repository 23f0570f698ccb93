"""What the trainer is given for a step of preferences: its divisors, and answers after other prompts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from qlora_tui.data.store import BAD, GOOD
from qlora_tui.recipe.schema import (
    PREFERENCE_METHODS,
    PreferenceMethod,
    Preferences,
)
from qlora_tui.training.adapter import StartingAdapter
from qlora_tui.training.batches import PlannedStep, RowShape, StepPlan
from qlora_tui.training.chunked_loss import find_head
from qlora_tui.training.model_loading import checkpoint_activations
from qlora_tui.training.preferences import (
    MismatchedSamples,
    PreferenceObjective,
    PreferenceSteps,
    RewardSums,
    collate_answers,
    score_with_reference,
)
from qlora_tui.training.token_losses import use_token_losses
from tests.training.preference_data import TokenLists
from tests.training.test_verify import adapted, massive_channel

pytestmark = pytest.mark.slow

SAMPLES = TokenLists(
    [
        ([1, 2, 11, 12], 2, GOOD),
        ([1, 2, 13], 2, BAD),
        ([3, 14, 15, 16], 1, GOOD),
        ([3, 17, 18], 1, BAD),
        ([4, 5, 6, 19], 3, GOOD),
        ([4, 5, 6, 20], 3, BAD),
    ]
)
"""Three pairs, whose chosen answers have 2, 3 and 1 tokens."""


def first_step(method: Preferences, sequences: tuple[tuple[int, ...], ...], rank: int, size: int) -> Any:
    """The first step of one of ``size`` processes, in micro-batches of one sequence."""
    plan = StepPlan((PlannedStep(sequences, 1.0, True),), len(sequences), 1)
    pairs = method != "kto"
    return PreferenceSteps(
        plan,
        SAMPLES,
        RowShape(packed=True, max_length=8),
        micro_batch=1,
        pairs=pairs,
        rank=rank,
        world_size=size,
    )[0]


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_is_divided_by_its_pairs(size: int) -> None:
    steps = [first_step("orpo", ((0, 1), (2, 3), (4, 5)), rank, size) for rank in range(size)]
    assert [step["loss_weight_sum"] for step in steps] == [3] * size
    # A token of the cross-entropy counts as much in each pair: the mean is over six tokens.
    assert [step["token_share"] for step in steps] == [3 / 6] * size
    sides = [[batch["sides"] for batch in step["micro_batches"]] for step in steps]
    pair = [GOOD, BAD]
    assert sides == ([[pair, pair, pair]] if size == 1 else [[pair, pair], [pair, []]])


def test_each_answer_of_a_step_follows_another_prompt() -> None:
    samples = MismatchedSamples(SAMPLES, (4, 0, 3), max_length=3)
    assert [samples.token_ids(i) for i in range(3)] == [[6, 17, 18], [1, 2, 19], [3, 11, 12]]
    assert [samples.loss_mask(i) for i in range(3)] == [[0, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert [samples.length(i) for i in range(3)] == [3, 3, 3]


def test_a_single_answer_follows_no_other_prompt() -> None:
    assert first_step("kto", ((0,),), 0, 1)["mismatched"] == []


class NoTokens(nn.Module):
    """A model whose loss is that of no tokens; its adapter can be turned off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, per_token: bool, **kwargs: Any) -> Any:
        assert per_token
        return SimpleNamespace(loss=self.weight[:0])

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(1, 1)

    def disable_adapter(self) -> nullcontext[None]:
        return nullcontext()


@pytest.mark.parametrize("method", PREFERENCE_METHODS)
def test_a_micro_batch_without_answers_costs_nothing(method: PreferenceMethod) -> None:
    model, objective = NoTokens(), PreferenceObjective(method, 0.1, 1.0)
    loss = objective.summed_loss(model, model, {"sides": [], "answer_tokens": []}, 1.0)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0 and objective.take_sums() == RewardSums()


@pytest.mark.parametrize("size", [1, 2])
def test_processes_share_the_mismatched_answers_of_a_step(size: int) -> None:
    steps = [first_step("kto", ((0, 3), (5,), (2,)), rank, size) for rank in range(size)]
    assert [step["loss_weight_sum"] for step in steps] == [4] * size
    assert sum(len(batch["sides"]) for step in steps for batch in step["mismatched"]) == 4


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize(
    ("model_type", "method"), [("llama", "nf4"), ("qwen3", "none"), ("gemma3_text", "none")]
)
def test_rewards_are_zero_before_the_first_step(
    model_type: str, method: str, further: bool, tmp_path: Path
) -> None:
    """To the last bit, in bfloat16: samples of lengths that are padded, some longer than a window."""
    model, base, _ = adapted(
        tmp_path, model_type, "bfloat16", method=method, build=massive_channel, dropout=0.0
    )
    use_token_losses(base.model, find_head(base.model))
    checkpoint_activations(base.model)
    if further:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (100, 21, 37, 5)]
    samples = TokenLists(
        [(each, len(each) // 2, side) for each, side in zip(ids, (GOOD, BAD) * 2, strict=True)]
    )
    batch = collate_answers([(0, 1), (2, 3)], samples, RowShape(packed=True, max_length=200))
    starting = StartingAdapter.of(model) if further else None
    assert not score_with_reference(model, batch, starting).requires_grad
    objective = PreferenceObjective("dpo", 0.1, 0.0, starting)
    torch.autograd.backward(objective.summed_loss(model.train(), model, batch, 0.0))
    sums = objective.take_sums()
    assert (sums.compared, sums.right, sums.good_reward, sums.bad_reward) == (2, 0, 0, 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and any(p.grad is not None and p.grad.any() for p in trained)
