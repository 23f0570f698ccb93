"""Chooses whether Triton's kernels compute the fused parts: on a GPU if they compile and agree with torch.

Triton compiles a kernel when it is first called, with the C compiler that it finds, so any error may occur
then. Therefore every kernel is called once on a few values. The kernels are verified again on the model
itself, in the first step of the run.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from inspect import isfunction, unwrap
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.catalog.optional_kernels import kernel_packages
from qlora_tui.training.checks.rounding import outputs_and_gradients, within_rounding

_ROUNDINGS = 8.0
"""Maximum difference of a kernel's value, in units in the last place of the row's largest value."""
_OLDEST_GPU = (7, 5)
"""Lowest compute capability that Triton's compiler supports."""
_TOKENS, _HEADS = 5, 5
_WIDTHS: tuple[int, ...] = (200, 3000)
"""Numbers of columns in the check. With 200, one program computes four rows and the next program the fifth.
With 3,000, each row has its own program, which has more warps.

Neither these numbers nor the widths of their heads are powers of two.
"""
_verified: dict[tuple[torch.device, torch.dtype], ModuleType | None] = {}
_refusals: dict[tuple[torch.device, torch.dtype], str] = {}
_is_allowed = True


def allow_kernels(allowed: bool) -> None:
    """Set whether Triton's kernels may be used at all (``model.kernels``)."""
    global _is_allowed
    _is_allowed = allowed


def find_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the module of kernels for tensors of this dtype on this device; None to fall back to torch.

    Always returns None until :func:`verify_kernels` has run, because every forward pass calls this function
    and kernels cannot be tested there.
    """
    return _verified.get((device, dtype)) if _is_allowed else None


def verify_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Try the kernels for tensors of this dtype on this device, once per process."""
    if _is_allowed and (device, dtype) not in _verified:
        _verified[device, dtype], _refusals[device, dtype] = _try_kernels(device, dtype)


def refusal_of_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the kernels were refused after a trial; empty if they are used, or were not tried."""
    return _refusals.get((device, dtype), "") if _is_allowed else ""


def kernel_remedy() -> str:
    """Return a remedy for refused kernels: Triton compiles their launcher with a C compiler."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    missing = [name for name, there in (("gcc", compiler), ("python3-dev", headers)) if not there]
    if missing:
        packages = " ".join(missing)
        return f"Install the compiler that Triton needs; on Debian and Ubuntu: `sudo apt install {packages}`."
    return "trainer.log has the whole error. model.kernels = torch leaves them off without this warning."


def _try_kernels(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """Return (kernels, empty string) if they work, or (None, reason) if they are refused. If there is nothing
    to try, return (None, empty string).
    """
    # Triton's interpreter runs on a CPU, in tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, ""
    # On older GPUs LLVM may terminate the process.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return None, ""
    if find_spec("triton") is None:
        return None, ""
    try:
        from qlora_tui.training.fused import triton_kernels

        wrong = _first_difference(triton_kernels, device, dtype)
    except Exception as error:
        traceback.print_exception(error)
        # A compiler's message begins with the place in the source.
        wrong = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return (None, wrong) if wrong else (triton_kernels, "")


def _first_difference(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernel differs from torch, and where; empty if none does."""
    for width in _WIDTHS:
        generator = torch.Generator().manual_seed(0)
        x, up, grad = (
            torch.randn(_TOKENS, width, generator=generator).mul_(3).to(device, dtype) for _ in range(3)
        )
        for name, computed, expected in _both_ways(kernels, x, up, grad):
            if not all(map(_is_same, computed, expected)):
                return f"{name} differs from torch at a width of {width} columns"
    return ""


Results: TypeAlias = tuple[str, list[Tensor], list[Tensor]]


def _both_ways(kernels: ModuleType, x: Tensor, up: Tensor, grad: Tensor) -> Iterator[Results]:
    """Yield the name of each kernel, with outputs and gradients by the kernel and by torch in float64.

    Args:
        x: (tokens, columns); ``up`` and ``grad`` have the same shape. For rotary positions each row holds
            four heads of queries and one of keys.
    """
    exact_x, exact_up, exact_grad = (values.double() for values in (x, up, grad))
    weight = torch.linspace(-2, 2, x.shape[1], device=x.device).to(x.dtype)
    for offset in (0.0, 1.0):

        def norm(leaf: Tensor, offset: float = offset) -> Tensor:
            inverse = torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-6)
            return leaf * inverse * (weight.double() + offset)

        out, inv_rms = kernels.rms_norm(x, weight, 1e-6, offset=offset, in_fp32=offset > 0)
        gradient = kernels.rms_norm_backward(grad, x, weight, inv_rms, offset=offset)
        yield "RMSNorm", [out, gradient], outputs_and_gradients(norm, [exact_x], [exact_grad])
    for name, act in (("silu", functional.silu), ("gelu_tanh", partial(functional.gelu, approximate="tanh"))):

        def product(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor] = act) -> Tensor:
            return act(gate) * up

        computed = [
            kernels.gated_product(x, up, name),
            *kernels.gated_product_backward(grad.clone(), x, up, name),
        ]
        expected = outputs_and_gradients(product, [exact_x, exact_up], [exact_grad])
        yield f"the gated product with {name}", computed, expected
    heads, grads = (values.view(1, _TOKENS, _HEADS, -1).transpose(1, 2) for values in (x, grad))
    width = heads.shape[-1]
    for rotary in (width, width // 2):
        angles = torch.linspace(-9, 9, _TOKENS * rotary, device=x.device).view(1, _TOKENS, rotary)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def turn(leaf: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return _rotated(leaf, cos.double(), sin.double())

        pairs = [
            kernels.rotate(heads[:, 1:], heads[:, :1], cos, sin),
            kernels.rotate(grads[:, 1:], grads[:, :1], cos, sin, backward=True),
        ]
        computed = [torch.cat([keys, queries], dim=1) for queries, keys in pairs]
        yield "the rotation", computed, outputs_and_gradients(turn, [heads.double()], [grads.double()])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (batch, heads, tokens, width) with its first columns rotated by torch.

    cos and sin: (batch, tokens, columns).
    """
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = rotary.chunk(2, dim=-1)
    across = torch.cat((-high, low), dim=-1)
    return torch.cat((rotary * cos[:, None] + across * sin[:, None], rest), dim=-1)


def _is_same(actual: Tensor, expected: Tensor) -> bool:
    largest = expected.abs().amax(-1, keepdim=True)
    return within_rounding(actual, expected, largest, _ROUNDINGS)


class InstalledKernels:
    """The functions of a model's modules that call installed kernels.

    transformers has a PyTorch function for each of them. flash-linear-attention 0.6.0 differs from those by
    one rounding of the dtype (relative norm of the differences in outputs and gradients: 5.9e-4 in float16,
    4e-7 in float32, run by Triton's interpreter).
    """

    def __init__(self, model: Any) -> None:
        """Find the functions in ``model``, which has no adapter."""
        self._functions: list[tuple[dict[str, Any], str, Any]] = []
        """(namespace of the function's module, name of the function in it, the function) for each function.
        """
        if not any(package.is_installed for package in kernel_packages(model.config.model_type)):
            return
        for module in sorted({type(module).__module__ for module in model.modules()}):
            names = vars(sys.modules[module])
            self._functions += [
                (names, name, function)
                for name, function in names.items()
                if isfunction(function) and getattr(unwrap(function), "__module__", "") == module
                if hasattr(function, "__wrapped__")
            ]

    def __len__(self) -> int:
        """Return the number of functions."""
        return len(self._functions)

    def use_ours(self) -> None:
        """Make the model call the installed kernels."""
        for names, name, function in self._functions:
            names[name] = function

    def use_reference(self) -> None:
        """Make the model call the PyTorch functions instead of the installed kernels."""
        for names, name, function in self._functions:
            names[name] = function.__wrapped__
