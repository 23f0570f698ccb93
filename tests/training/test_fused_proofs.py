"""Only modules that compute what a fused function computes are replaced, and by kernels that are right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Environment, Finished, Health, LayersKept
from qlora_tui.training.fused import gated_mlp, kernel_choice, norm_rotary
from qlora_tui.training.fused.kernel_choice import _rotated
from qlora_tui.training.fused.patching import PatchedForwards
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of
from tests.training.test_faults import inject_fault
from tests.training.trained_weights import build_with_trained_weights, in_turns, trained_norm_weight

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


CPU = torch.device("cpu")
Pair = tuple[Tensor, Tensor]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Pair:
    """What the kernel computes."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    with torch.enable_grad():
        out = [_rotated(x, cos, sin).to(x.dtype) for x in leaves]
    pair = torch.autograd.grad(out, leaves, (q, k)) if backward else [x.detach() for x in out]
    return pair[0], pair[1]


KERNELS = cast(ModuleType, SimpleNamespace(rotate=rotate))


def halves(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def columns(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def family(turn: Callable[[Tensor], Tensor], *, cast_back: bool = False, scale: float = 1.0) -> Any:
    """A family's function, with its own way to turn a head."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        cos, sin = cos[:, None], sin[:, None]
        q_out, k_out = (scale * x * cos + turn(x) * sin for x in (q, k))
        return (q_out.to(q.dtype), k_out.to(k.dtype)) if cast_back else (q_out, k_out)

    return function


def kinds(function: Any, dtype: torch.dtype) -> set[norm_rotary.CallKind]:
    return set(norm_rotary._same_kinds(KERNELS, function, (4, 2), 16, CPU, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_of_halves_is_replaced(dtype: torch.dtype) -> None:
    assert kinds(family(halves), dtype) == {(True, dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_angles_in_float32_are_allowed_where_results_are_cast_back(dtype: torch.dtype) -> None:
    assert kinds(family(halves, cast_back=True), dtype) == {(True, dtype), (True, torch.float32)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_of_part_of_each_head_is_replaced(dtype: torch.dtype) -> None:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    assert kinds(function, dtype) == {(True, dtype), (False, dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "function",
    [
        family(columns),
        family(lambda x: -halves(x)),
        family(halves, scale=1.02),
        lambda q, k, cos, sin: (family(halves)(q, k, cos, sin)[0], k),
        lambda q, k, cos, sin: family(halves)(q, k, cos, cos),
        lambda q, k, cos, sin: (q, k, cos / 0, "no pair"),
        lambda q, k: (q, k),
    ],
)
def test_another_rotation_is_left_to_the_library(function: Any, dtype: torch.dtype) -> None:
    assert not kinds(function, dtype)


def test_a_wrong_gradient_is_refused() -> None:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        q, k = (x + (0.1 * x - (0.1 * x).detach()) for x in (q, k))
        return family(halves)(q, k, cos, sin)  # type: ignore[no-any-return]

    assert not kinds(function, torch.float32)


WIDTH = 640
FORMS = [
    norm_rotary.RmsNormVariant(),
    norm_rotary.RmsNormVariant(multiply_in_fp32=True),
    norm_rotary.RmsNormVariant(offset=1.0, multiply_in_fp32=True),
]
Formula = Callable[[Tensor, Tensor, float], Tensor]


def unit(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * unit(x, eps).to(x.dtype)


def olmo2(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight * unit(x, eps)).to(x.dtype)


def gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (unit(x, eps) * (1.0 + weight.float())).type_as(x)


RIGHT_NORMS: dict[Formula, norm_rotary.RmsNormVariant] = dict(zip([llama, olmo2, gemma], FORMS, strict=True))
WRONG_NORMS: dict[str, Formula] = {
    "epsilon ten times as large": lambda x, weight, eps: llama(x, weight, 10 * eps),
    "epsilon twice as large": lambda x, weight, eps: gemma(x, weight, 2 * eps),
    "no epsilon": lambda x, weight, eps: olmo2(x, weight, 0.0),
    "epsilon outside the root": lambda x, weight, eps: (
        weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)
    ),
    "offset of 0.5": lambda x, weight, eps: (unit(x, eps) * (0.5 + weight.float())).type_as(x),
    "offset of 1.01": lambda x, weight, eps: (unit(x, eps) * (1.01 + weight.float())).type_as(x),
    "offset in the weight's dtype, then 16 bits": lambda x, weight, eps: (
        (1.0 + 2.0**-5 + weight) * unit(x, eps).to(x.dtype)
    ),
    "mean subtracted": lambda x, weight, eps: llama(x - x.mean(-1, keepdim=True), weight, eps),
    "weight left out": lambda x, weight, eps: unit(x, eps).to(x.dtype),
    "scale of 0.99": lambda x, weight, eps: (0.99 * weight * unit(x, eps)).to(x.dtype),
    "halves on their own": lambda x, weight, eps: torch.cat(
        [llama(half, w, eps) for half, w in zip(x.chunk(2, -1), weight.chunk(2), strict=True)], dim=-1
    ),
    "one channel left out of 640": lambda x, weight, eps: llama(x, weight, eps).index_fill(
        -1, torch.tensor([3]), 0.0
    ),
}


class FormulaRMSNorm(nn.Module):
    """One that computes by ``formula``, with weights as a trained model has them."""

    def __init__(self, formula: Formula, dtype: torch.dtype, eps: float = 1e-6) -> None:
        super().__init__()
        self.formula, self.eps = formula, eps
        self.weight = nn.Parameter(trained_norm_weight(WIDTH).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", RIGHT_NORMS, ids=lambda formula: formula.__name__)
def test_the_form_is_known_under_weights_that_hide_it(formula: Formula, dtype: torch.dtype) -> None:
    variant = norm_rotary._find_variant(FormulaRMSNorm(formula, dtype))
    expected = RIGHT_NORMS[formula]
    if dtype == torch.float32:  # where the product is cast makes no difference
        assert variant is not None and variant.offset == expected.offset
    else:
        assert variant == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_NORMS)
def test_a_norm_of_another_formula_stays_the_librarys(name: str, dtype: torch.dtype) -> None:
    assert norm_rotary._find_variant(FormulaRMSNorm(WRONG_NORMS[name], dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_form_is_taken_where_two_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        norm_rotary,
        "_distinguishable_variants",
        lambda dtype: (FORMS[0], norm_rotary.RmsNormVariant(offset=1e-30)),
    )
    assert norm_rotary._find_variant(FormulaRMSNorm(llama, dtype)) is None


def test_wide_rows_are_as_exact_as_the_librarys() -> None:
    x = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0)).mul_(1.5).exp_()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    ours, _ = norm_rotary._rms_norm(x, torch.ones(4096), 1e-6, FORMS[0])

    def error(values: Tensor) -> float:
        return float((values.double() / exact - 1).pow(2).mean().sqrt())

    assert error(ours) < 1.1 * error(unit(x, 1e-6))


def test_a_norm_is_restored_to_the_librarys_forward() -> None:
    model = nn.Sequential(FormulaRMSNorm(gemma, torch.float32), nn.Linear(WIDTH, 4))
    norm_rotary.fuse_rms_norm(model)
    assert "forward" in vars(model[0])
    replaced = PatchedForwards(model, "norms")
    assert len(replaced) == 1
    replaced.use_reference()
    assert "forward" not in vars(model[0]) and len(PatchedForwards(model, "norms")) == 0


@pytest.mark.parametrize(("model_type", "dtype"), in_turns(DTYPES))
def test_a_familys_gated_mlps_and_trained_norms_are_the_librarys(model_type: str, dtype: torch.dtype) -> None:
    model = build_with_trained_weights(model_type, dtype)
    parts = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    mlps = [m for m in model.modules() if {name for name, _ in m.named_children()} == parts]
    assert bool(mlps) == (model_type not in NOT_GATED.split())
    assert all(gated_mlp.is_gated(mlp) == (model_type != "seed_oss") for mlp in mlps)
    norms = [m for m in model.modules() if is_known(m)]
    rows = [heavy_rows(len(m.weight), dtype) for m in norms]
    expected = [value_and_gradient(m, x) for m, x in zip(norms, rows, strict=True)]
    norm_rotary.fuse_rms_norm(model)
    assert all("forward" in vars(m) for m in norms)
    eps = torch.finfo(dtype).eps
    for module, x, (value, gradient) in zip(norms, rows, expected, strict=True):
        our_value, our_gradient = value_and_gradient(module, x)
        assert our_value.dtype == value.dtype
        assert ((our_value - value).abs() <= 16 * eps * value.abs()).all()
        # What a row's gradient sums up to is as exact as its largest term.
        assert ((our_gradient - gradient).abs() <= 16 * eps * gradient.abs().amax(-1, keepdim=True)).all()


def is_known(module: nn.Module) -> bool:
    """An RMSNorm with a weight: Gemma 4 has some without, which have nothing to save."""
    return type(module).__name__.endswith("RMSNorm") and any(True for _ in module.parameters())


def heavy_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Hidden states (2, 7, width) with a massive channel."""
    rows = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1))
    rows[..., width // 3] *= 500
    return rows.to(dtype)


def value_and_gradient(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weighted sum of its outputs, in fp32."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    return out.detach().float(), x.grad.float()


COMPILATION_ERROR = """at 2:7:
def _rms_forward(
       ^
Cannot access global variable Any from within @jit'ed function"""


def test_kernels_are_not_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_choice.find_kernels(torch.device("cpu"), torch.float32) is None


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose compiler refuses them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: object())
    monkeypatch.setattr(kernel_choice, "_verified", {})
    monkeypatch.setattr(kernel_choice, "_refusals", {})
    name = "qlora_tui.training.fused.triton_kernels"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr("qlora_tui.training.fused.triton_kernels", ModuleType(name), raising=False)

    def refuse(*args: object) -> str:
        raise RuntimeError(COMPILATION_ERROR)

    monkeypatch.setattr(kernel_choice, "_first_difference", refuse)


@pytest.mark.usefixtures("refused")
def test_kernels_left_off_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_is_allowed", False)
    kernel_choice.verify_kernels(CPU, torch.float32)
    assert kernel_choice.refusal_of_kernels(CPU, torch.float32) == ""


def test_a_run_says_that_its_kernels_were_refused(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "refuse_kernels()")
    run = create_run(recipe({"training.gradient_checkpointing": "auto"}))
    assert trainers.run(run) == 0
    (health,) = [event for event in events_of(run, Health) if event.kind == "kernels_refused"]
    assert "No C compiler" in health.evidence and health.severity == "warning"
    assert events_of(run, Environment)[0].kernels == "torch"
    (kept,) = events_of(run, LayersKept)
    assert kept.kept_layers == kept.layers and events_of(run, Finished)
