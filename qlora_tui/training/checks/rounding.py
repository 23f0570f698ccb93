"""Tells whether two computations of the same values differ only by rounding; all checks use it.

Each element is compared relative to its own magnitude, never to the largest value in its tensor: trained
models have outlier channels, which would make an error in all other channels look small.

:func:`bitwise_equal` and :func:`equal_up_to_rounding` compare results of the same operations.
:func:`within_rounding` compares sums at the magnitude of their terms. :func:`within_noise` compares the error
of a kernel whose rounding is unknown with the error of the library's own computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NOISE_FACTOR = 3.0
"""Multiple of the rounding noise by which the first step, a merged model or a chat's scores may differ.

Correct steps stay below 1.7 on SmolLM2-135M and Gemma-3-270M in float32 and bfloat16; Gemma with Llama's form
of RMSNorm is above 25.
"""
_MAX_DRAWS = 4
_ROUNDING = {torch.float32: 2.0, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Rounding error by which each module's output is perturbed, in machine epsilons.

16-bit results are rounded once. In float32 the order of a sum over thousands of products matters.
"""
_UNITS = {torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Units in the last place by which an element may differ.

In 16 bits both computations use float32 and round once. In float32 the order of a sum over a row matters.
"""
_DIFFERING = {torch.float32: 1.0, torch.bfloat16: 0.01, torch.float16: 0.02}
"""Share of the elements that may differ at all.

In 16 bits a float32 rounding difference crosses a rounding boundary in about 1 of 1,000 elements (bfloat16: 1
of 10,000), while an additional rounding changes 1 of 5.
"""


def bitwise_equal(actual: Tensor, expected: Tensor) -> bool:
    """Return whether dtype, shape and every bit are equal, as after the same operations in the same order."""
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def equal_up_to_rounding(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors can result from the same elementwise operations, rounded at the same places.

    False if dtype or shape differ, or if either tensor has a NaN.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    differs = actual != expected  # infinities that agree are equal; NaN differs
    if not bool(differs.any()):
        return True
    limits = torch.finfo(actual.dtype)
    wide, wanted = actual.double(), expected.double()
    tolerance = _UNITS[actual.dtype] * limits.eps * wanted.abs() + limits.smallest_normal * limits.eps
    within_rounding = (wide - wanted).abs() <= tolerance
    share = float(differs.double().mean())
    return bool((within_rounding | ~differs).all()) and share <= _DIFFERING[actual.dtype]


def within_rounding(actual: Tensor, expected: Tensor, scale: Tensor, roundings: float) -> bool:
    """Return whether every element differs by at most ``roundings`` rounding errors at its ``scale``.

    ``scale`` has one value per element: the magnitude of the terms from which the element was computed, which
    exceeds the element itself if terms cancel. A rounding error is ``eps`` of the dtype of ``actual``,
    relative to ``scale``. NaN counts as a difference.
    """
    if actual.shape != expected.shape:
        return False
    limits = torch.finfo(actual.dtype)
    tolerance = roundings * limits.eps * scale.double().abs() + limits.smallest_normal
    differs = actual != expected
    within_rounding = (actual.double() - expected.double()).abs() <= tolerance
    return bool((within_rounding | ~differs).all())


def within_noise(actual: Tensor, exact: Tensor, noise: Tensor, factor: float) -> bool:
    """Return whether every element's distance from its exact value is at most ``factor`` times the noise.

    NaN counts as too far. ``noise`` is the error of a second way to compute the same values, and at least the
    rounding error.
    """
    return bool(((actual.double() - exact).abs() <= factor * noise).all())


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Return a function's outputs, and the gradients of its inputs for these gradients of its outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        returned = function(*leaves)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        gradients = torch.autograd.grad(outputs, leaves, list(grads))
    return [*(output.detach() for output in outputs), *gradients]


def example_rows(*shape: int, seed: int = 0, outlier: float = 1.0) -> Tensor:
    """Return normally distributed values (…, columns), equal in every process.

    About three evenly spaced columns are multiplied by ``outlier``. The activations of trained models also
    have a few columns that are much larger than the others.
    """
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows[..., :: max(shape[-1] // 3, 1)] *= outlier
    return rows


def rounding_error_of(dtype: torch.dtype) -> float:
    """Return the relative rounding error of the output of a module that computes in ``dtype``."""
    return _ROUNDING[dtype] * torch.finfo(dtype).eps


@contextmanager
def rounding_errors(model: nn.Module, size: float, *, seed: int) -> Iterator[None]:
    """Perturb the outputs of all modules without submodules, and the gradients of these outputs.

    Each element changes by the relative ``size``, up or down at random.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def error(x: Tensor) -> Tensor:
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=torch.int8)
        return x.detach() * signs.to(x.dtype).mul_(2 * size).sub_(size)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not torch.is_tensor(output) or not output.is_floating_point():
            return None
        moved = output + error(output)
        if moved.requires_grad:
            moved.register_hook(lambda gradient: gradient + error(gradient))  # type: ignore[no-untyped-call]
        return moved

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(hook) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounding_noise(
    model: nn.Module, dtype: torch.dtype, change: Callable[[], float], difference: float
) -> float:
    """Return the largest change that simulated rounding errors cause in a model's result, over a few draws.

    Args:
        model: computes in ``dtype``.
        dtype: dtype of the rounding errors.
        change: runs the model, and returns how far the result is from a run without errors.
        difference: drawing ends once the noise explains this difference.
    """
    noise = 0.0
    for draw in range(_MAX_DRAWS):
        with rounding_errors(model, rounding_error_of(dtype), seed=draw):
            noise = max(change(), noise)
        if difference <= NOISE_FACTOR * noise:
            break
    return noise
