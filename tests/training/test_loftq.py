"""LoftQ beside peft's decomposition, and how much nearer it starts to the 16-bit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from qlora_tui.catalog.lookup import load_architecture
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import AttentionPath
from qlora_tui.recipe.schema import Lora, Quantization, Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Evaluated
from qlora_tui.runs.view import RunView
from qlora_tui.training.adapter import add_lora, targets_by_name
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.loftq import low_rank_factors, start_at_rounding_errors
from qlora_tui.training.model_loading import load_base
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of

pytestmark = pytest.mark.slow

LORA = Lora(rank=16, alpha=64, rank_pattern={"v_proj": 48}, init_weights="loftq")
EAGER: AttentionPath = "eager"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_factors_are_those_of_peft(shape: tuple[int, int]) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = _low_rank_decomposition(matrix, 6)
    left, right = low_rank_factors(matrix, 6)
    torch.testing.assert_close(left @ right, expected["L"] @ expected["R"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.abs(), expected["L"].abs(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(right.abs(), expected["R"].abs(), rtol=1e-3, atol=1e-4)
    wide = low_rank_factors(matrix, 99)
    torch.testing.assert_close(wide[0] @ wide[1], matrix, rtol=1e-4, atol=1e-4)


def nf4_with_lora(folder: Path) -> Any:
    recipe = Recipe(quantization=Quantization(compute_dtype="float32"))
    base = load_base(folder, recipe, find_device(recipe), EAGER)
    return add_lora(base, LORA, load_architecture(str(folder)))


def log_probs(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return values


def test_it_starts_nearer_to_the_16_bit_model(tiny_model: Path) -> None:
    """With a scale of 4, and in v_proj a rank above the number of outputs."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    model = nf4_with_lora(tiny_model)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = log_probs(exact)

    def divergence() -> float:
        return float((expected.exp() * (expected - log_probs(model))).sum(-1).mean())

    without = divergence()
    targets = targets_by_name(model.base_model.model, LORA, load_architecture(str(tiny_model)))
    share = start_at_rounding_errors(model, tiny_model, targets)
    assert 0.4 < share < 0.9
    assert divergence() < 0.6 * without
    stored = dict(exact.named_parameters())
    for name, module in model.base_model.model.named_modules():
        if name not in targets:
            continue
        quantized = module.get_base_layer().weight
        error = stored[f"{name}.weight"] - dequantize_4bit(quantized.data, quantized.quant_state)
        left, singular, right = torch.linalg.svd(error, full_matrices=False)
        rank = 48 if name.endswith("v_proj") else 16
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        torch.testing.assert_close(module.get_delta_weight("default"), best, rtol=1e-3, atol=1e-4)
    [last] = [m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.v_proj")]
    assert last.lora_A["default"].weight[32:].abs().min() > 0
    assert not last.lora_B["default"].weight[:, 32:].any()


def test_weights_that_are_not_there_are_explained(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = nf4_with_lora(tiny_model)
    targets = targets_by_name(model.base_model.model, LORA, load_architecture(str(tiny_model)))
    weights = load_file(tiny_model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(changed: dict[str, torch.Tensor]) -> pytest.RaisesExc[UserError]:
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        return pytest.raises(UserError, match="LoftQ cannot start this adapter")

    for changed, why in (
        ({key: value for key, value in weights.items() if key != name}, "have no weight of"),
        (weights | {name: weights[name].T.contiguous()}, "in the files and"),
        (weights | {name: weights[name].to(torch.int8)}, "is stored quantized"),
    ):
        with refused(changed) as caught:
            start_at_rounding_errors(model, tmp_path, targets)
        assert why in caught.value.what


def test_a_run_starts_with_it(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe({"lora.init_weights": "loftq", "training.max_steps": 2}))
    assert trainers.run(run) == 0
    view = RunView(run)
    view.refresh()
    compared = view.validation_change
    assert compared is not None
    # The base is the one without the adapter.
    assert events_of(run, Evaluated)[0].loss != pytest.approx(compared.before, abs=1e-4)
    assert "squared rounding errors" in run.log_path.read_text()
