"""Which MLPs are computed by our own function: those whose forward is down(act(gate) · up) and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.training.fused import gated_mlp
from tests.training.trained_weights import build_with_trained_weights, in_turns

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOT_GATED = (
    "arcee bloom codegen falcon glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granitemoe lfm2 "
)
NOT_GATED += "mixtral nemotron olmoe opt phi phi3 qwen3_moe starcoder2"


class PlainMLP(nn.Module):
    """One that computes by ``formula`` of itself and its input."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.formula = formula
        self.gate_proj, self.up_proj = nn.Linear(48, 96, dtype=dtype), nn.Linear(48, 96, dtype=dtype)
        self.down_proj = nn.Linear(96, 48, dtype=dtype)
        self.act_fn: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def inner(mlp: Any, x: Tensor) -> Tensor:
    product: Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return product


def with_clamps(mlp: Any, x: Tensor) -> Tensor:
    """Of gpt-oss's kind."""
    gate, up = mlp.gate_proj(x).clamp(max=200), mlp.up_proj(x).clamp(min=-200, max=200)
    out: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return out


RIGHT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "as Llama writes it": lambda mlp, x: mlp.down_proj(inner(mlp, x)),
    "as FalconH1 writes it": lambda mlp, x: mlp.down_proj(mlp.up_proj(x) * mlp.act_fn(mlp.gate_proj(x))),
}
MUTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "output scaled by 1.005": lambda mlp, x: 1.005 * mlp.down_proj(inner(mlp, x)),
    "product scaled": lambda mlp, x: mlp.down_proj(0.99 * inner(mlp, x)),
    "gate scaled": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x) * 1.01) * mlp.up_proj(x)),
    "input scaled": lambda mlp, x: mlp.down_proj(inner(mlp, x * 0.99)),
    "another activation": lambda mlp, x: mlp.down_proj(functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x)),
    "gelu by tanh": lambda mlp, x: mlp.down_proj(
        functional.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x)
    ),
    "gate and up exchanged": lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)),
    "gate and up clamped": with_clamps,
    "residual added": lambda mlp, x: x + mlp.down_proj(inner(mlp, x)),
    "dropout of the output": lambda mlp, x: functional.dropout(
        mlp.down_proj(inner(mlp, x)), 0.1, training=mlp.training
    ),
    "dropout of the product": lambda mlp, x: mlp.down_proj(
        functional.dropout(inner(mlp, x), 0.1, training=mlp.training)
    ),
    "product normed": lambda mlp, x: mlp.down_proj(functional.rms_norm(inner(mlp, x), (96,))),
    "weight read past the module": lambda mlp, x: mlp.down_proj(
        mlp.act_fn(functional.linear(x, mlp.gate_proj.weight, mlp.gate_proj.bias)) * mlp.up_proj(x)
    ),
    "one channel's sign turned": lambda mlp, x: mlp.down_proj(
        torch.cat([-inner(mlp, x)[..., :1], inner(mlp, x)[..., 1:]], dim=-1)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_gated_mlp_is_known(name: str, dtype: torch.dtype) -> None:
    mlp = PlainMLP(RIGHT[name], dtype)
    assert gated_mlp.is_gated(mlp)
    assert mlp.training and not any("forward" in vars(module) for module in mlp.modules())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_an_mlp_that_does_anything_else_stays_the_librarys(name: str, dtype: torch.dtype) -> None:
    assert not gated_mlp.is_gated(PlainMLP(MUTANTS[name], dtype))


@pytest.mark.parametrize("right", ["gelu", "gelu_pytorch_tanh"])
def test_in_bf16_the_two_gelus_are_told_apart(right: str) -> None:
    """They differ by 0.0005 at most."""
    approximate = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
    for other, named in approximate.items():
        mlp = PlainMLP(RIGHT["as Llama writes it"], torch.bfloat16)
        mlp.formula = lambda self, x, named=named: self.down_proj(  # type: ignore[misc]
            functional.gelu(self.gate_proj(x), approximate=named) * self.up_proj(x)
        )
        mlp.act_fn = nn.GELU(approximate=approximate[right])
        assert gated_mlp.is_gated(mlp) == (other == right)


def test_each_layer_is_tested_by_itself() -> None:
    """Gemma 3n's layers are of one class; the first ones drop most of what the gate lets through."""

    class SparseMLP(PlainMLP):
        sparsity = 0.0

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate_proj(x)
            if self.sparsity:
                gate = gate.where(gate > gate.quantile(self.sparsity, dim=-1, keepdim=True), 0)
            out: Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(x))
            return out

    layers = [SparseMLP(RIGHT["as Llama writes it"], torch.float32) for _ in range(2)]
    layers[1].sparsity = 0.95
    assert [gated_mlp.is_gated(layer) for layer in layers] == [True, False]


@pytest.mark.parametrize(("model_type", "dtype"), in_turns(DTYPES))
def test_all_gated_mlps_without_dropout_are_recognized(model_type: str, dtype: torch.dtype) -> None:
    parts = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    modules = build_with_trained_weights(model_type, dtype).modules()
    mlps = [module for module in modules if {name for name, _ in module.named_children()} == parts]
    assert bool(mlps) == (model_type not in NOT_GATED.split())
    assert all(gated_mlp.is_gated(mlp) == (model_type != "seed_oss") for mlp in mlps)
