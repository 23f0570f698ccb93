"""Which rotary functions the rotary kernel may replace; the kernel itself is replaced by torch here."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from qlora_tui.training.fused import rotary
from qlora_tui.training.fused.kernel_choice import _rotated

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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


def kinds(function: Any, dtype: torch.dtype) -> set[rotary.CallKind]:
    return set(rotary._same_kinds(KERNELS, function, (4, 2), 16, CPU, dtype))


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
