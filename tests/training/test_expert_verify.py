"""The first step's check on 4-bit experts: right code passes in each dtype, wrong code is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.base_model import prepare_base
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.experts import routed_function
from qlora_tui.training.model_loading import checkpoint_activations
from qlora_tui.training.step_verification import VerificationResult, verify_step
from tests.training.test_experts import BOTH
from tests.training.test_verify import excerpt, massive_channel
from tests.training.trained_weights import CLAIMED

pytestmark = pytest.mark.slow


def verify(
    folder: Path, model_type: str, dtype: Any, targets: tuple[str, ...], *, packed: bool | None = None
) -> VerificationResult:
    massive_channel(model_type, getattr(torch, dtype), **CLAIMED[model_type]).save_pretrained(folder)
    recipe = Recipe(
        model=Model(id=str(folder)),
        quantization=Quantization(compute_dtype=dtype),
        lora=Lora(rank=4, alpha=8, target_modules=targets),
    )
    device = find_device(recipe)
    base = prepare_base(folder, recipe, device, "segments", "chunked", weighted=False)
    assert packed is None or base.padding_free == packed
    torch.manual_seed(0)
    model = add_lora(base.model, recipe.lora, resolve_model(str(folder)).architecture)
    checkpoint_activations(base.model, preserve_rng_state=False)
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult), verified
    return verified


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss", "qwen3_moe"])
def test_right_experts_pass(model_type: str, dtype: str, tmp_path: Path) -> None:
    verified = verify(tmp_path, model_type, dtype, ("all-linear", *BOTH), packed=True)
    assert verified.agrees and verified.replaced == (), verified.comparison


def without_adapter(patch: pytest.MonkeyPatch) -> None:
    """The adapter's part of the input's gradient is left out."""
    right = routed_function.Projection.input_gradient

    def gradient(self: Any, grad: Tensor, expert: int, memory: Tensor | None) -> Tensor:
        bare = routed_function.Projection(self.read, self.transposed, self.inputs, self.outputs, self.bias)
        return right(bare, grad, expert, memory)

    patch.setattr(routed_function.Projection, "input_gradient", gradient)


def other_slots(patch: pytest.MonkeyPatch) -> None:
    """Weights are those of other slots."""
    right = routed_function.sort_by_expert

    def sort(chosen: Tensor, experts: int) -> routed_function.Routes:
        routes = right(chosen, experts)
        return routed_function.Routes(routes.order.flip(0), routes.tokens, routes.counts)

    patch.setattr(routed_function, "sort_by_expert", sort)


@pytest.mark.parametrize("mutate", [without_adapter, other_slots])
def test_wrong_experts_are_replaced(
    mutate: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    verified = verify(tmp_path, "qwen3_moe", "float32", ("q_proj", *BOTH))
    assert verified.agrees and verified.replaced == ("experts",)
