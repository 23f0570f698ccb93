"""EVA beside peft's own initialization. A run with it is in test_embedding_noise.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from qlora_tui.catalog.lookup import load_architecture
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora
from qlora_tui.training import eva
from qlora_tui.training.adapter import add_lora, targets_by_name
from qlora_tui.training.chunked_loss import IGNORED, loss_positions
from qlora_tui.training.eva import main_directions, set_main_directions

pytestmark = pytest.mark.slow

RANK = 4
LORA = Lora(rank=RANK, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"), init_weights="eva")
CPU = torch.device("cpu")


def new_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def batches() -> list[dict[str, Any]]:
    """Padded sequences whose first tokens are not trained."""
    generator = torch.Generator().manual_seed(3)
    padded = []
    for _ in range(3):
        ids = torch.randint(0, 380, (2, 30), generator=generator)
        labels = ids.clone()
        labels[:, :10] = IGNORED
        padded.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return padded


def directions_of(model: Any, batches: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    names = list(targets_by_name(model, LORA, load_architecture(str(folder))))
    return main_directions(model, names, RANK, batches, CPU, lambda number: None)


def test_the_directions_are_those_of_peft(tiny_model: Path, batches: list[dict[str, Any]]) -> None:
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    base = new_model(tiny_model)
    directions = directions_of(base, batches, tiny_model)
    model = add_lora(base, LORA, load_architecture(str(tiny_model)))
    set_main_directions(model, directions)
    config = LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=list(LORA.target_modules),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    theirs: Any = get_peft_model(new_model(tiny_model), config)
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    ours, expected = (dict(each.named_parameters()) for each in (model, theirs))
    matrices = [name for name in expected if "lora_A" in name]
    assert len(matrices) == 6 == len(directions)
    for name in matrices:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)
        orthonormal = ours[name] @ ours[name].T
        torch.testing.assert_close(orthonormal, torch.eye(RANK), rtol=1e-4, atol=1e-4)
    assert not any(parameter.any() for name, parameter in ours.items() if "lora_B" in name)


def test_labels_cut_short_lose_their_places_in_the_loss(batches: list[dict[str, Any]]) -> None:
    wide = []
    for batch in batches:
        labels = torch.cat([batch["labels"]] * 10)
        wide.append({"labels": labels, "loss_positions": loss_positions(labels)})
    counts = []
    for batch in eva._Batches(wide, CPU):
        assert torch.equal(batch["loss_positions"], loss_positions(batch["labels"]))
        counts.append(len(batch["loss_positions"]))
    assert counts == [64, 400, 400]


def test_what_eva_cannot_do_is_explained(
    tiny_model: Path, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model)
    few = [{**batch, "labels": torch.full_like(batch["labels"], IGNORED)} for batch in batches]
    with pytest.raises(UserError, match="no micro-batch has 4 trained tokens"):
        directions_of(model, few, tiny_model)
    monkeypatch.setattr(eva, "MAX_PASSES", 1)
    with pytest.raises(UserError, match="did not settle in 1 passes"):
        directions_of(model, batches, tiny_model)
