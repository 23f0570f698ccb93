"""Attention, norms and gated MLPs as functions of our own: what the library's give, with less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.training import packed_attention, padding
from qlora_tui.training.fused import cpu_attention as lean_attention
from qlora_tui.training.fused import rms_norm
from tests.training.families import FAMILIES, build

pytestmark = pytest.mark.slow

LENGTHS = [5, 1, 23, 12]
SCALING = 0.3


def qkv(heads: int, shared: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as modules give them: a token after the other, then turned."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, shared, shared)
    return [
        torch.randn(1, sum(LENGTHS), count, 16, generator=generator).to(dtype).requires_grad_()
        for count in sizes
    ]


def attended(given: list[Tensor], *, ours: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "prefers_row_attention", lambda query: ours)
        mask = packed_attention.segment_mask(LENGTHS)
        q, k, v = (x.detach().requires_grad_() for x in given)
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        out, _ = packed_attention.segment_attention(nn.Module(), queries, keys, values, mask, scaling=SCALING)
        torch.autograd.backward(out, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("block", [512, 7])
@pytest.mark.parametrize(("heads", "shared", "grouped"), [(6, 2, True), (6, 2, False), (4, 4, True)])
def test_attention_and_its_gradients_equal_the_stock_kernels(
    heads: int, shared: int, grouped: bool, block: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding, "token_multiple", lambda device, dtype: multiple)
    monkeypatch.setattr(lean_attention, "_kernel_supports_gqa", lambda: grouped)
    monkeypatch.setattr(lean_attention, "ATTENTION_BLOCK_ROWS", block)
    given = qkv(heads, shared)
    expected = attended(given, ours=False, monkeypatch=monkeypatch)
    computed = attended(given, ours=True, monkeypatch=monkeypatch)
    assert len(computed) == 4
    for one, other in zip(computed, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_bf16_gradients_are_nearly_as_accurate_as_the_stock_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = qkv(6, 2, dtype=torch.bfloat16)
    exact = attended([x.float() for x in given], ours=False, monkeypatch=monkeypatch)
    errors = [
        max(
            float((one.float() - other).norm() / other.norm())
            for one, other in zip(attended(given, ours=ours, monkeypatch=monkeypatch), exact, strict=True)
        )
        for ours in (True, False)
    ]
    assert errors[0] < 2 * errors[1] < 0.02


def test_scores_far_above_their_sum_are_masked_and_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the diagonal the exponential overflows."""
    given = [x.detach() * 40 for x in qkv(4, 2)]
    for tensor in attended(given, ours=True, monkeypatch=monkeypatch):
        assert torch.isfinite(tensor).all()


def rounding_of_scores(given: list[Tensor]) -> tuple[float, float]:
    """The norm that rounding the gradient of each score in fp32 leaves in those of queries and keys."""
    q, k, v = (x.detach().double().transpose(1, 2)[0] for x in given)
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed = (sample[:, None] == sample).tril()
    weights = (SCALING * q @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1)
    grad = torch.linspace(-1, 1, q.numel()).view(-1, q.shape[0], q.shape[-1]).transpose(0, 1).double()
    eps = torch.finfo(torch.float32).eps
    scores = eps * SCALING * weights * (grad.abs() @ v.abs().mT)
    of_keys = (scores.mT @ q.abs()).view(-1, group, *k.shape[1:]).sum(1)
    return float((scores @ k.abs()).norm()), float(of_keys.norm())


@pytest.mark.parametrize("size", [1, 100, 1_000, 10_000])
def test_large_bf16_scores_have_gradients_as_accurate_as_stock(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained models have scores in the hundreds, where nearly all of the softmax is one token's.

    Then a score's gradient is the difference of two equal numbers, of which rounding in fp32 leaves what the
    order of a CPU's additions leaves.
    """
    q, k, v = qkv(6, 2, dtype=torch.bfloat16)
    given = [(q.detach() * size).to(torch.bfloat16), k, v]
    exact = attended([x.double() for x in given], ours=False, monkeypatch=monkeypatch)
    ours, stock = (attended(given, ours=ours, monkeypatch=monkeypatch) for ours in (True, False))
    rounding = [0.0, *rounding_of_scores(given), 0.0]
    for name, one, other, expected, least in zip("oqkv", ours, stock, exact, rounding, strict=True):
        limit = 1.5 * (other - expected).norm() + 3e-3 * expected.norm() + least
        assert (one - expected).norm() <= limit, name


def test_in_bf16_what_all_keys_share_costs_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bias gives it to them (Qwen2)."""
    q, k, v = qkv(6, 2, dtype=torch.bfloat16)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 8
    given = [q, (k.detach() + bias).to(torch.bfloat16), v]
    exact = attended([x.float() for x in given], ours=False, monkeypatch=monkeypatch)
    computed = attended(given, ours=True, monkeypatch=monkeypatch)
    errors = [
        float((one.float() - other).norm() / other.norm()) for one, other in zip(computed, exact, strict=True)
    ]
    assert max(errors) < 0.015


def test_float16_overflow_has_the_stock_kernels_gradients() -> None:
    """A query's log-sum over the scale is 80,000 here; float16 ends at 65,504."""
    given = [x.detach().half().transpose(1, 2) for x in qkv(4, 2)]
    given[0] = torch.full_like(given[0], 70.0)
    given[1] = (given[1] / 8 + 70.0).half()
    gradients = []
    for dtype in (torch.float16, torch.float32):
        q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in given)
        mask = packed_attention.segment_mask(LENGTHS)
        out, _ = packed_attention.segment_attention(nn.Module(), q, k, v, mask, scaling=0.1)
        torch.autograd.backward(out, torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape))
        gradients.append([x.grad.float() for x in (q, k, v) if x.grad is not None])
    assert len(gradients[0]) == 3
    # Toward the queries all keys are nearly the same: what is left is rounding.
    assert torch.isfinite(gradients[0][0]).all()
    for one, other in zip(*(of_one[1:] for of_one in gradients), strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_rms_norm_is_recognized_and_equals_the_original(model_type: str) -> None:
    model = build(model_type)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, std=0.5)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    given = [3 * torch.randn(2, 7, len(m.weight)) for m in norms]
    expected = [value_and_gradient(m, x) for m, x in zip(norms, given, strict=True)]
    rms_norm.fuse_rms_norm(model)
    assert all("forward" in vars(m) for m in norms)
    assert norms or model_type == "cohere"
    for module, x, (value, gradient) in zip(norms, given, expected, strict=True):
        output, toward = value_and_gradient(module, x)
        assert torch.allclose(output, value, atol=1e-5) and torch.allclose(toward, gradient, atol=1e-5)


def value_and_gradient(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weighted sum of its outputs."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def test_a_norm_that_does_more_stays_as_it_is() -> None:
    class ShiftedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return functional.rms_norm(x, (8,), self.weight, self.eps) + 0.5

    model = nn.Sequential(ShiftedRMSNorm())
    rms_norm.fuse_rms_norm(model)
    assert "forward" not in vars(model[0])
