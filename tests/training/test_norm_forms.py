"""Which RMSNorm modules are computed by our own function, under weights as trained models have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_tui.training.fused import rms_norm
from qlora_tui.training.fused.patching import PatchedForwards
from tests.training.trained_weights import build_with_trained_weights, in_turns, trained_norm_weight

pytestmark = pytest.mark.slow

WIDTH = 640
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [
    rms_norm.RmsNormVariant(),
    rms_norm.RmsNormVariant(multiply_in_fp32=True),
    rms_norm.RmsNormVariant(offset=1.0, multiply_in_fp32=True),
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


RIGHT: dict[Formula, rms_norm.RmsNormVariant] = dict(zip([llama, olmo2, gemma], FORMS, strict=True))
MUTANTS: dict[str, Formula] = {
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
@pytest.mark.parametrize("formula", RIGHT, ids=lambda formula: formula.__name__)
def test_the_form_is_known_under_weights_that_hide_it(formula: Formula, dtype: torch.dtype) -> None:
    variant = rms_norm._find_variant(FormulaRMSNorm(formula, dtype))
    expected = RIGHT[formula]
    if dtype == torch.float32:  # where the product is cast makes no difference
        assert variant is not None and variant.offset == expected.offset
    else:
        assert variant == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_norm_of_another_formula_stays_the_librarys(name: str, dtype: torch.dtype) -> None:
    assert rms_norm._find_variant(FormulaRMSNorm(MUTANTS[name], dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_form_is_taken_where_two_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rms_norm, "_distinguishable_variants", lambda dtype: (FORMS[0], rms_norm.RmsNormVariant(offset=1e-30))
    )
    assert rms_norm._find_variant(FormulaRMSNorm(llama, dtype)) is None


def test_wide_rows_are_as_exact_as_the_librarys() -> None:
    x = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0)).mul_(1.5).exp_()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    ours, _ = rms_norm._rms_norm(x, torch.ones(4096), 1e-6, FORMS[0])

    def error(values: Tensor) -> float:
        return float((values.double() / exact - 1).pow(2).mean().sqrt())

    assert error(ours) < 1.1 * error(unit(x, 1e-6))


def test_a_norm_is_restored_to_the_librarys_forward() -> None:
    model = nn.Sequential(FormulaRMSNorm(gemma, torch.float32), nn.Linear(WIDTH, 4))
    rms_norm.fuse_rms_norm(model)
    assert "forward" in vars(model[0])
    replaced = PatchedForwards(model, "norms")
    assert len(replaced) == 1
    replaced.use_reference()
    assert "forward" not in vars(model[0]) and len(PatchedForwards(model, "norms")) == 0


@pytest.mark.parametrize(("model_type", "dtype"), in_turns(DTYPES))
def test_a_familys_trained_norms_give_the_librarys_values(model_type: str, dtype: torch.dtype) -> None:
    model = build_with_trained_weights(model_type, dtype)
    norms = [m for m in model.modules() if is_known(m)]
    rows = [heavy_rows(len(m.weight), dtype) for m in norms]
    expected = [value_and_gradient(m, x) for m, x in zip(norms, rows, strict=True)]
    rms_norm.fuse_rms_norm(model)
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
