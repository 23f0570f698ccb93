"""Chat's shortcuts are used where they give what the libraries give, and a wrong one is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_tui.chat import adapters, cpu
from qlora_tui.chat.chat_types import ADAPTER, BASE

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS, OUTPUTS = 96, 160


# Adapters


def peft_layer(dtype: torch.dtype, **config: Any) -> Any:
    """A linear module with an adapter whose factors have outliers."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    layer = Linear(base, ADAPTER, LoraConfig(r=8), r=8, lora_alpha=24, **config)
    with torch.no_grad():
        for factor in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
            factor.normal_(std=0.05)
            factor[3] *= 40
    return layer.to(dtype).requires_grad_(False).eval()


Speak = Callable[[adapters.LoraForward, str, Tensor], Tensor]
right: Speak = adapters.LoraForward.forward_with


def with_factors(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Speak:
    def speak(forward: adapters.LoraForward, adapter_name: str, x: Tensor) -> Tensor:
        factors = forward._factors[adapter_name]
        forward._factors[adapter_name] = change(*factors)
        try:
            return right(forward, adapter_name, x)
        finally:
            forward._factors[adapter_name] = factors

    return speak


WRONG_ADAPTERS: dict[str, Speak] = {
    "scale dropped": with_factors(lambda down, up: (down, up / 3)),
    "scale 2 % too large": with_factors(lambda down, up: (down, up * 1.02)),
    "one rank left out": with_factors(lambda down, up: (down, up * (torch.arange(8) != 5)[:, None])),
    "outputs shifted": with_factors(lambda down, up: (down, up.roll(1, dims=1))),
    "inputs shifted": with_factors(lambda down, up: (down.roll(1, dims=0), up)),
    "base left out": lambda forward, adapter_name, x: right(forward, adapter_name, x) - forward._base(x),
    "base twice": lambda forward, adapter_name, x: right(forward, adapter_name, x) + forward._base(x),
    "no adapter": lambda forward, adapter_name, x: right(forward, BASE, x),
}


def matches_peft(layer: Any) -> bool:
    forward = adapters.LoraForward(layer.get_base_layer(), adapters.ActiveAdapter(BASE))
    forward.register(ADAPTER, layer)
    return adapters.matches_peft(layer, ADAPTER, forward)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_adds_as_peft_is_accepted(dtype: torch.dtype) -> None:
    layer = peft_layer(dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert matches_peft(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(value.dtype == dtype for value in layer.state_dict().values())
    assert "forward" not in vars(layer) and "forward" not in vars(layer.get_base_layer())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_an_adapter_that_adds_anything_else_is_left_to_peft(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.LoraForward, "forward_with", WRONG_ADAPTERS[name])
    assert not matches_peft(peft_layer(dtype))


def test_a_model_whose_adapter_differs_computes_by_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([peft_layer(torch.float32)])
    assert adapters.fuse_adapter(model, ADAPTER, adapters.ActiveAdapter(ADAPTER))
    adapters.restore_peft(model)
    monkeypatch.setattr(adapters.LoraForward, "forward_with", WRONG_ADAPTERS["scale dropped"])
    assert not adapters.fuse_adapter(model, ADAPTER, adapters.ActiveAdapter(ADAPTER))


# Heads in groups


def one_token(dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A layer of six query and two key heads, and what it attends with: scores to the hundreds."""
    module: Any = nn.Module()
    module.num_key_value_groups = 3
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 1, 16, generator=generator) * 20
    key, value = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(2))
    key[..., 3] *= 30
    value[..., 5] *= 100
    return module, query.to(dtype), key.to(dtype), value.to(dtype)


Grouped = Callable[[float | None, Tensor, Tensor, Tensor], Tensor]
grouped: Grouped = cpu._in_groups
WRONG_GROUPS: dict[str, Grouped] = {
    "heads transposed": lambda scaling, q, k, v: grouped(scaling, q, k, v)[:, :, [0, 3, 1, 4, 2, 5]],
    "key heads exchanged": lambda scaling, q, k, v: grouped(scaling, q, k.flip(1), v),
    "value heads exchanged": lambda scaling, q, k, v: grouped(scaling, q, k, v.flip(1)),
    "scale dropped": lambda scaling, q, k, v: grouped(None, q, k, v),
    "scale 3 % too large": lambda scaling, q, k, v: grouped(1.03 * (scaling or 0.25), q, k, v),
    "the last key left out": lambda scaling, q, k, v: grouped(scaling, q, k[:, :, :-1], v[:, :, :-1]),
    "output 1 % too large": lambda scaling, q, k, v: 1.01 * grouped(scaling, q, k, v),
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_verified", {})


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_groups_are_proved_at_the_first_token(dtype: torch.dtype) -> None:
    cpu.attend(*one_token(dtype), None, scaling=0.3)
    assert list(cpu._verified.values()) == [True]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_heads_grouped_otherwise_give_way_to_the_library(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_in_groups", WRONG_GROUPS[name])
    module, query, key, value = one_token(dtype)
    output, _ = cpu.attend(module, query, key, value, None, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    assert list(cpu._verified.values()) == [False] and torch.equal(output, expected)


# The CPU's layout of 4-bit weights


@pytest.fixture
def four_bit_layer() -> Callable[..., Any]:
    """Makes a 4-bit layer with outlier rows, columns and blocks."""
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this CPU has no product of 4-bit weights")

    def make(kind: str = "nf4", *, bias: bool = False, nested: bool = True) -> Any:
        torch.manual_seed(0)
        layer = Linear4bit(
            256,
            128,
            bias=bias,
            compute_dtype=torch.bfloat16,
            quant_type=kind,
            compress_statistics=nested,
        )
        weight = layer.weight.data
        weight.mul_(torch.randn_like(weight).exp())
        weight[3] *= 50
        weight[:, 70] *= 50
        return layer.requires_grad_(False).to(torch.bfloat16).to("cpu").eval()

    return make


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_cpus_layout_is_proved_on_a_copy(
    four_bit_layer: Callable[..., Any], kind: str, bias: bool, nested: bool
) -> None:
    layer = four_bit_layer(kind, bias=bias, nested=nested)
    layer.support_avx512bf16_for_cpu = False
    before = layer.weight.data.clone()
    assert cpu.layout_agrees(layer)
    assert torch.equal(layer.weight.data, before) and not layer.support_avx512bf16_for_cpu


def mixed_up(change: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    """bitsandbytes' conversion with a mistake in it."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    def convert(weight: Tensor, state: Any, *rest: Any) -> Any:
        converted, state = _convert_weight_packed_for_cpu(weight, state, *rest)
        return change(converted, state), state

    return convert


def scales_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def changed(weight: Tensor, state: Any) -> Tensor:
        state.absmax = change(state.absmax).contiguous()
        return weight

    return changed


def one_scale_off(scales: Tensor) -> Tensor:
    scales = scales.clone()
    scales.view(-1)[17] *= 1.5
    return scales


WRONG_LAYOUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "rows exchanged": lambda weight, state: weight.roll(1, dims=0).contiguous(),
    "nibbles exchanged": lambda weight, state: (weight >> 4) | (weight << 4),
    "scales 5 % too large": scales_changed(lambda scales: scales * 1.05),
    "scales of other blocks": scales_changed(lambda scales: scales.roll(1, dims=-1)),
    "one block's scale off": scales_changed(one_scale_off),
}


@pytest.mark.parametrize("name", WRONG_LAYOUTS)
def test_a_wrong_layout_is_not_used(
    name: str, four_bit_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = four_bit_layer()
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(1, 256).bfloat16()
    expected = layer(x)
    convert = mixed_up(WRONG_LAYOUTS[name])
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", convert)
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert not layer.support_avx512bf16_for_cpu and "forward" not in vars(layer)
    assert torch.equal(layer(x), expected)


def test_a_kernel_called_wrongly_is_not_called_directly(
    four_bit_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = cpu._direct_kernel

    def wrong(layer: Any) -> Callable[[Tensor], Tensor] | None:
        product = direct(layer)
        return product and (lambda x: product(x) * 1.01)

    monkeypatch.setattr(cpu, "_direct_kernel", wrong)
    layer = four_bit_layer()
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert layer.support_avx512bf16_for_cpu and "forward" not in vars(layer)
