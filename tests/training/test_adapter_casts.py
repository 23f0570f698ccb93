"""Copies of the adapter in the compute dtype: made once per forward, and never outdated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qlora_tui.training.fused.lora import AdapterCasts
from tests.training.families import build, with_adapter

pytestmark = pytest.mark.slow


@pytest.fixture
def model() -> Any:
    return with_adapter(build("llama").bfloat16()).train()


def casts_of(model: Any) -> AdapterCasts:
    hooks = model.get_base_model().get_decoder()._forward_pre_hooks.values()
    (casts,) = (owner for hook in hooks if isinstance(owner := hook.__self__, AdapterCasts))
    return casts


def lora_weights(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(3, 40)[None]
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad for parameter in lora_weights(model) if parameter.grad is not None]


def test_copies_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_copies = gradients(model)
    monkeypatch.setattr(AdapterCasts, "_valid_copy", lambda self, parameter, dtype: None)
    assert all(map(torch.equal, with_copies, gradients(model)))


def test_a_forward_refreshes_copies_of_weights_changed_unnoticed(model: Any) -> None:
    """bitsandbytes' optimizers write through a pointer, which torch does not notice."""
    other = copy.deepcopy(lora_weights(model)[0].data).add_(1)
    gradients(model)
    versions = [weight._version for weight in lora_weights(model)]
    lora_weights(model)[0].data.copy_(other)
    assert [weight._version for weight in lora_weights(model)] == versions
    gradients(model)
    weight = lora_weights(model)[0]
    assert torch.equal(casts_of(model).cast(weight, torch.bfloat16), other.bfloat16())


def test_a_changed_weight_is_cast_again_without_a_forward(model: Any) -> None:
    gradients(model)
    weight = lora_weights(model)[0]
    assert casts_of(model).cast(weight, torch.bfloat16) is casts_of(model).cast(weight, torch.bfloat16)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(casts_of(model).cast(weight, torch.bfloat16), weight.bfloat16())


def test_a_model_in_float32_needs_no_copies() -> None:
    model = with_adapter(build("llama")).train()
    gradients(model)
    assert not casts_of(model)._copies
