"""Losses and gradients of preference methods, beside those of TRL's trainers on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.data.store import BAD, GOOD
from qlora_tui.recipe.schema import PreferenceMethod
from tests.training.conftest import MakeRecipe
from tests.training.preference_data import TokenLists

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl")

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
    from qlora_tui.training.base_model import prepare_base
    from qlora_tui.training.chunked_loss import find_head
    from qlora_tui.training.compute_device import choose_attention, find_device
    from qlora_tui.training.token_losses import use_token_losses

    device = find_device(recipe)
    base = prepare_base(folder, recipe, device, choose_attention(recipe, device), "chunked", weighted=False)
    assert base.padding_free
    use_token_losses(base.model, find_head(base.model))
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


def token_lists(method: PreferenceMethod, batch: Any) -> TokenLists:
    """The samples of a batch of TRL's, in our order."""
    if method in ("orpo", "simpo"):
        samples = []
        for i in range(len(batch["chosen_input_ids"])):
            for side, name in ((GOOD, "chosen"), (BAD, "rejected")):
                ids, labels = batch[f"{name}_input_ids"][i], batch[f"{name}_labels"][i]
                real = int(batch[f"{name}_attention_mask"][i].sum())
                samples.append((ids[:real].tolist(), int((labels[:real] == -100).sum()), side))
        return TokenLists(samples)
    ids, mask, answers = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    lengths = mask.sum(1).tolist()
    starts = [n - a for n, a in zip(lengths, answers.sum(1).tolist(), strict=True)]
    half = len(ids) // 2
    if method == "kto":
        order, sides = list(range(len(ids))), [GOOD if good else BAD for good in batch["label"]]
    else:
        order = [i for pair in range(half) for i in (pair, half + pair)]
        sides = [GOOD] * half + [BAD] * half
    return TokenLists([(ids[i][: lengths[i]].tolist(), starts[i], sides[i]) for i in order])


@pytest.mark.parametrize("method", ["orpo", "dpo", "simpo", "kto"])
def test_loss_and_gradients_are_those_of_trl(
    recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, method: PreferenceMethod
) -> None:
    import torch

    from qlora_tui.training.batches import RowShape
    from qlora_tui.training.preferences import MismatchedSamples, PreferenceObjective, collate_answers

    model = our_model(recipe({"quantization.method": "none"}), tiny_model)
    trainer = their_trainer(method, model, tiny_model, tmp_path)
    theirs = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(theirs, batch)
    torch.autograd.backward(expected)

    samples = token_lists(method, batch)
    shape = RowShape(packed=True, max_length=64)
    objective = PreferenceObjective(method, BETA, GAMMA)
    everything = tuple(range(len(samples)))
    comparisons = len(samples) if method == "kto" else len(samples) // 2
    if method == "kto":
        # TRL makes its mismatched answers before it shuffles the rows.
        mismatched = _trl_mismatched(batch)
        other = MismatchedSamples(samples, everything, 64)
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


def _trl_mismatched(batch: Any) -> TokenLists:
    lengths = batch["KL_attention_mask"].sum(1).tolist()
    answers = batch["KL_completion_mask"].sum(1).tolist()
    return TokenLists(
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
    from qlora_tui.training.batches import RowShape
    from qlora_tui.training.preferences import (
        collate_answers,
        score_answers,
        score_with_reference,
    )

    model = our_model(recipe({"quantization.method": "none", "lora.dropout": 0.5}), tiny_model).eval()
    samples = TokenLists([([5, 6, 7, 8], 2, GOOD), ([5, 6, 9], 2, BAD)])
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
