"""Preference methods: their formulas, steps and reference, next to numbers by hand and TRL's trainers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.data.step_plan import PlannedStep, StepPlan
from qlora_tui.data.store import BAD, GOOD
from qlora_tui.recipe.preference_methods import PREFERENCE_METHODS, PreferenceMethod
from qlora_tui.recipe.schema import Preferences
from qlora_tui.training import loss as chunked_loss
from qlora_tui.training import loss as head_chunks
from qlora_tui.training.adapter import StartingAdapter
from qlora_tui.training.batches import RowShape, Steps, collate_answers, mismatched_samples
from qlora_tui.training.loss import ChunkedHead, token_losses
from qlora_tui.training.model import checkpoint_activations
from qlora_tui.training.preferences import (
    PreferenceObjective,
    RewardSums,
    logistic_loss,
    odds_ratio_loss,
    prospect_loss,
    score_with_reference,
)
from qlora_tui.training.samples import Sample, SampleList
from tests.training.conftest import MakeRecipe
from tests.training.test_verify import adapted, massive_channel


def write_pairs(file: Path, rows: int = 24) -> Path:
    """Write rows that each compare two answers of differing lengths."""
    lines = [
        {
            "prompt": f"what is {i}",
            "chosen": f"the red {'fox ' * (i % 4)}is {i}",
            "rejected": f"the blue {'dog ' * (i % 3)}was {i}",
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_rated(file: Path, rows: int = 24) -> Path:
    """Write rows that each rate one answer, good and bad in turn."""
    lines = [
        {
            "prompt": f"what is {i // 2}",
            "completion": f"the {'blue dog was' if i % 2 else 'red fox is'} {i // 2}",
            "label": i % 2 == 0,
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def token_lists(samples: Sequence[tuple[list[int], int, int]]) -> SampleList:
    """Samples in memory: token ids, the first token of the answer, and the side of each."""
    return SampleList(
        [
            Sample(ids, [int(at >= start) for at in range(len(ids))], None, side)
            for ids, start, side in samples
        ]
    )


pytestmark = pytest.mark.slow


def test_the_odds_ratio_is_that_of_the_probabilities() -> None:
    chosen, rejected = torch.tensor([math.log(0.8), math.log(0.01)]), torch.tensor([math.log(0.5)] * 2)
    odds = torch.tensor([0.8 / 0.2, 0.01 / 0.99])
    expected = -0.1 * torch.log(odds / (1 + odds))
    assert torch.allclose(odds_ratio_loss(chosen, rejected, 0.1), expected)


def test_a_certain_answer_has_a_finite_gradient() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    torch.autograd.backward(odds_ratio_loss(chosen, torch.tensor([-1.0]), 0.1).sum())
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all()


def test_equal_rewards_cost_a_coin_flip() -> None:
    same = torch.tensor([0.3])
    assert float(logistic_loss(same, same)) == pytest.approx(math.log(2))
    assert float(logistic_loss(same + 1, same, 1.0)) == pytest.approx(math.log(2))


def test_kto_wants_good_answers_above_and_bad_ones_below() -> None:
    rewards, moved = torch.tensor([0.5, 0.5, 0.1]), torch.tensor(0.1)
    losses = prospect_loss(rewards, torch.tensor([True, False, True]), moved)
    assert losses.tolist() == pytest.approx([1 / (1 + math.exp(0.4)), 1 / (1 + math.exp(-0.4)), 0.5])


@pytest.mark.parametrize("rows", [(), (3, 17)])
def test_token_losses_weighted_afterwards_equal_the_summed_loss(
    rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "block_rows", lambda device: 3)
    torch.manual_seed(0)
    projection = torch.nn.Linear(16, 40, bias=True).requires_grad_(False)
    head = ChunkedHead(projection, 0.7, 5.0)
    targets, weights = torch.randint(40, (300,)), torch.rand(300)
    ids = torch.tensor(rows) if rows else None
    results = []
    for by_token in (True, False):
        torch.manual_seed(1)
        states = torch.randn(300, 16, requires_grad=True)
        values = torch.randn(len(rows), 16, requires_grad=True) if rows else None
        if by_token:
            loss = (token_losses(states, targets, head, ids, values) * weights).sum()
        else:
            loss = chunked_loss.chunked_sum(states, targets, head, weights, ids, values)
        torch.autograd.backward(loss)
        results.append((loss.detach(), states.grad, None if values is None else values.grad))
    for ours, expected in zip(*results, strict=True):
        assert (ours is None and expected is None) or torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)


SAMPLES = token_lists(
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
    return Steps(
        plan,
        SAMPLES,
        RowShape(packed=True, max_length=8),
        micro_batch=1,
        compares=True,
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
    samples = mismatched_samples(SAMPLES, (4, 0, 3), max_length=3)
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
    checkpoint_activations(base.model)
    if further:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (100, 21, 37, 5)]
    samples = token_lists(
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


PAIRS = [
    {"prompt": "a", "chosen": " red fox sat in an oak", "rejected": " blue dog"},
    {"prompt": "a", "chosen": " wise old owl", "rejected": " lazy dog jumps over the answer"},
    {"prompt": "a", "chosen": " green colour", "rejected": " red colour of how many"},
]
"""The prompt is one token: ORPO's cross-entropy includes prompts in TRL, and here the answer alone."""
BETA, GAMMA = 0.3, 0.2


def our_model(recipe: Any, folder: Path) -> Any:
    """The tiny model as a run prepares it, with an adapter that changes its answers."""
    import torch

    from qlora_tui.training.adapter import add_lora
    from qlora_tui.training.compute_device import choose_attention, find_device
    from qlora_tui.training.model import prepare_base

    device = find_device(recipe)
    base = prepare_base(folder, recipe, device, choose_attention(recipe, device), "chunked", weighted=False)
    assert base.padding_free
    model = add_lora(base.model, recipe.lora, load_architecture(str(folder)), ())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def their_trainer(method: PreferenceMethod, adapted: Any, folder: Path, output: Path) -> Any:
    """TRL's trainer with a model of its own, whose adapter has the weights of ``adapted``.

    The trainer adds the adapter itself: of a model that comes with one, it would take that as the reference.
    """
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "beta": BETA,
        "max_length": 64,
    }
    rows: list[dict[str, Any]] = [*PAIRS]
    if method == "dpo":
        trainer, config = trl.DPOTrainer, trl.DPOConfig
    elif method == "kto":
        trainer, config = trl.KTOTrainer, trl.KTOConfig
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in PAIRS
            for side in ("chosen", "rejected")
        ]
    elif method == "orpo":
        from trl.experimental.orpo import ORPOConfig as config
        from trl.experimental.orpo import ORPOTrainer as trainer
    else:
        from trl.experimental.cpo import CPOConfig as config
        from trl.experimental.cpo import CPOTrainer as trainer

        settings |= {"loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trl_trainer = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        args=config(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    set_peft_model_state_dict(trl_trainer.model, get_peft_model_state_dict(adapted))
    return trl_trainer


def samples_of_trl(method: PreferenceMethod, batch: Any) -> SampleList:
    """The samples of a batch of TRL's, in our order."""
    if method in ("orpo", "simpo"):
        samples = []
        for i in range(len(batch["chosen_input_ids"])):
            for side, name in ((GOOD, "chosen"), (BAD, "rejected")):
                ids, labels = batch[f"{name}_input_ids"][i], batch[f"{name}_labels"][i]
                real = int(batch[f"{name}_attention_mask"][i].sum())
                samples.append((ids[:real].tolist(), int((labels[:real] == -100).sum()), side))
        return token_lists(samples)
    ids, mask, answers = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    lengths = mask.sum(1).tolist()
    starts = [n - a for n, a in zip(lengths, answers.sum(1).tolist(), strict=True)]
    half = len(ids) // 2
    if method == "kto":
        order, sides = list(range(len(ids))), [GOOD if good else BAD for good in batch["label"]]
    else:
        order = [i for pair in range(half) for i in (pair, half + pair)]
        sides = [GOOD] * half + [BAD] * half
    return token_lists([(ids[i][: lengths[i]].tolist(), starts[i], sides[i]) for i in order])


@pytest.mark.parametrize("method", ["orpo", "dpo", "simpo", "kto"])
def test_loss_and_gradients_are_those_of_trl(
    recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, method: PreferenceMethod
) -> None:
    import torch

    from qlora_tui.training.batches import RowShape, collate_answers, mismatched_samples
    from qlora_tui.training.preferences import PreferenceObjective

    model = our_model(recipe({"quantization.method": "none"}), tiny_model)
    trainer = their_trainer(method, model, tiny_model, tmp_path)
    theirs = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(theirs, batch)
    torch.autograd.backward(expected)

    samples = samples_of_trl(method, batch)
    shape = RowShape(packed=True, max_length=64)
    objective = PreferenceObjective(method, BETA, GAMMA)
    everything = tuple(range(len(samples)))
    comparisons = len(samples) if method == "kto" else len(samples) // 2
    if method == "kto":
        # TRL makes its mismatched answers before it shuffles the rows.
        mismatched = _trl_mismatched(batch)
        other = mismatched_samples(samples, everything, 64)
        assert sorted(other.length(i) for i in everything) == sorted(map(mismatched.length, everything))
        divergence, count = objective.divergence(model, collate_answers([everything], mismatched, shape))
        objective.set_divergence(divergence / count)
    ours = collate_answers([everything], samples, shape)
    good = sum(sum(samples.loss_mask(i)) for i in everything if samples.side(i) == GOOD)
    loss = objective.summed_loss(model, model, ours, comparisons / good) / comparisons
    torch.autograd.backward(loss)

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            difference = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert float(difference) < 1e-4, name


def _trl_mismatched(batch: Any) -> SampleList:
    lengths = batch["KL_attention_mask"].sum(1).tolist()
    answers = batch["KL_completion_mask"].sum(1).tolist()
    return token_lists(
        [
            (batch["KL_input_ids"][i][:n].tolist(), n - answer, GOOD)
            for i, (n, answer) in enumerate(zip(lengths, answers, strict=True))
        ]
    )


def test_a_further_trained_adapter_is_compared_with_its_start(
    recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    import torch

    from qlora_tui.training.adapter import StartingAdapter
    from qlora_tui.training.batches import RowShape, collate_answers
    from qlora_tui.training.preferences import score_answers, score_with_reference

    model = our_model(recipe({"quantization.method": "none", "lora.dropout": 0.5}), tiny_model).eval()
    samples = token_lists([([5, 6, 7, 8], 2, GOOD), ([5, 6, 9], 2, BAD)])
    batch = collate_answers([(0, 1)], samples, RowShape(packed=True, max_length=64))
    with torch.no_grad():
        start = score_answers(model, batch).log_probabilities
        StartingAdapter.of(model).write(tmp_path / "adapter.safetensors")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
        after = score_answers(model, batch).log_probabilities
    starting = StartingAdapter.read(tmp_path / "adapter.safetensors", model)
    # Without dropout, also within a training step.
    model.train()
    assert torch.equal(score_with_reference(model, batch, starting), start)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert torch.equal(score_answers(model, batch).log_probabilities, after)
    assert not torch.allclose(after, start)
