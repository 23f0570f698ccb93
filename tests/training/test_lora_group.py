"""Adapted modules that read one input, computed together: what each computes alone, and what peft does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_tui.training import adapter
from qlora_tui.training.fused.lora_group import SharedInput
from qlora_tui.training.model_loading import checkpoint_activations
from tests.training.families import build, with_adapter

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 43)[None]


def groups_of(model: Any) -> list[SharedInput]:
    hooks = model.get_base_model().get_decoder()._forward_pre_hooks.values()
    return [owner for hook in hooks if isinstance(owner := hook.__self__, SharedInput)]


def names_of(model: Any) -> list[list[str]]:
    """The modules of each group, by the last part of their names."""
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return [[names[member.module] for member in group.members] for group in groups_of(model)]


def step(model: Any, *, together: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of each trained parameter."""
    model.zero_grad()
    for group in groups_of(model):
        group._is_shared = together
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    assert all(group._is_shared == together for group in groups_of(model))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a gradient."""
    assert actual.keys() == expected.keys()
    return max(
        float((gradient.double() - expected[name].double()).norm() / expected[name].double().norm())
        for name, gradient in actual.items()
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all modules": ("llama", {}),
    "biases": ("qwen2", {}),
    "norms of heads": ("qwen3", {}),
    "parallel halves": ("cohere", {}),
    "queries and values alone": ("llama", {"target_modules": ("q_proj", "v_proj")}),
    "up alone": ("llama", {"target_modules": ("up_proj", "o_proj")}),
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "other ranks": ("llama", {"rank_pattern": {"k_proj": 2, "up_proj": 7}}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft(case: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family, lora = CASES[case]
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "use_fused", lambda model: None)
        expected_logits, expected = step(with_adapter(build(family), **lora).train())
    model = with_adapter(build(family), **lora).train()
    if checkpointing:
        checkpoint_activations(model.get_base_model())
    logits, gradients = step(model)
    assert torch.allclose(logits, expected_logits, atol=1e-4)
    assert distance(gradients, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_as_exact_as_alone(dtype: torch.dtype) -> None:
    """The adapters are float32, as on Turing and Pascal, which compute in float16."""
    _, exact = step(with_adapter(build("llama").to(dtype).float()).train())
    model = with_adapter(build("llama").to(dtype)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    _, together = step(model)
    _, alone = step(model, together=False)
    assert {gradient.dtype for gradient in together.values()} == {torch.float32}
    assert 0 < distance(together, exact) < 1.2 * distance(alone, exact)


@pytest.mark.parametrize("entered", [torch.float16, torch.float32])
def test_float16_autocast_is_as_exact_as_alone(entered: torch.dtype) -> None:
    """Trainer's float16 mode, where a norm may hand on float32."""
    model = with_adapter(build("llama").half()).train()
    (group, *_) = groups_of(model)
    modules = [member.module for member in group.members]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, modules[0].in_features, generator=generator).to(entered)

    def outputs_and_gradients(together: bool) -> list[Tensor]:
        group._is_shared = together
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            outputs = [module(leaf) for module in modules]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        weights = [w for module in modules for w in (module.lora_A.default, module.lora_B.default)]
        gradients = [leaf.grad, *(weight.weight.grad for weight in weights)]
        model.zero_grad()
        return [*(output.detach() for output in outputs), *gradients]

    for one, other in zip(outputs_and_gradients(True), outputs_and_gradients(False), strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one.float(), other.float(), rtol=2e-2, atol=2e-3 * float(other.abs().max()))


def test_modules_of_one_input_are_grouped() -> None:
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    assert names_of(with_adapter(build("llama"))) == [attention, mlp] * 2
    some = with_adapter(build("llama"), target_modules=("q_proj", "v_proj", "up_proj", "down_proj"))
    assert names_of(some) == [["q_proj", "v_proj"]] * 2


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_are_computed_one_by_one(lora: dict[str, Any]) -> None:
    assert not groups_of(with_adapter(build("llama"), **lora))


def calls_of(model: Any) -> tuple[SharedInput, list[Any], Tensor]:
    model.train()
    (group, *_) = groups_of(model)
    modules = [member.module for member in group.members]
    generator = torch.Generator().manual_seed(0)
    return group, modules, torch.randn(1, 5, modules[0].in_features, generator=generator)


def test_a_module_given_another_input_is_computed_by_itself() -> None:
    group, (q, k, v), x = calls_of(with_adapter(build("llama")))
    other = x + 1
    expected = [module(given).detach() for module, given in ((k, other), (q, x), (k, other), (v, x))]
    group._is_shared = False
    alone = [module(given) for module, given in ((k, other), (q, x), (k, other), (v, x))]
    for one, another in zip(expected, alone, strict=True):
        assert torch.allclose(one, another, atol=1e-5)


def test_outputs_that_nothing_took_end_the_sharing() -> None:
    model = with_adapter(build("llama"))
    group, (q, k, v), x = calls_of(model)
    q(x), k(x), v(x)
    group.before_forward(nn.Module(), ())
    assert group._is_shared and group._input is None
    q(x), v(x)
    group.before_forward(nn.Module(), ())
    assert (group._is_shared, group._outputs) == (False, {})


def test_without_gradients_nothing_is_computed_ahead() -> None:
    group, (q, _, _), x = calls_of(with_adapter(build("llama")))
    with torch.no_grad():
        q(x)
    assert not group._outputs


def test_a_disabled_adapter_is_left_out() -> None:
    model = with_adapter(build("llama"))
    group, (q, _, _), x = calls_of(model)
    with model.disable_adapter():
        assert torch.equal(q(x), q.get_base_layer()(x))
    assert not group._outputs
