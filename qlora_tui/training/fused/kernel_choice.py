"""Whether Triton's kernels compute the fused parts: on a GPU where they compile and compute what torch does.

Triton compiles a kernel when it is first called, with the C compiler that it finds, so anything may go wrong
there. So every kernel is called once on a few values. What a model computes with them is verified again on
the model itself, in the first step of the run.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

_ROUNDINGS = 8.0
"""Units in the last place of the dtype, of the largest value of a row, by which a kernel may differ."""
_OLDEST_GPU = (7, 5)
"""Compute capability from which Triton's compiler is supported."""
_TOKENS, _HEADS = 5, 5
_WIDTHS: tuple[int, ...] = (200, 3000)
"""Columns of the check: four short rows in a program and one in the next, and a row with more warps.
Neither they nor the columns of a head are a power of two."""
_verified: dict[tuple[torch.device, torch.dtype], ModuleType | None] = {}
_refusals: dict[tuple[torch.device, torch.dtype], str] = {}
_is_allowed = True


def allow_kernels(allowed: bool) -> None:
    """Use Triton's kernels, or leave everything to torch (``model.kernels``)."""
    global _is_allowed
    _is_allowed = allowed


def find_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels for tensors of this dtype on this device; None where torch computes.

    Before :func:`verify_kernels` that is everywhere: this is called in each forward, where nothing can be
    tried.
    """
    return _verified.get((device, dtype)) if _is_allowed else None


def verify_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Try the kernels for tensors of this dtype on this device, once per process."""
    if _is_allowed and (device, dtype) not in _verified:
        _verified[device, dtype], _refusals[device, dtype] = _try_kernels(device, dtype)


def refusal_of_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Return why kernels that were tried are not used; empty where they are, or were not tried."""
    return _refusals.get((device, dtype), "") if _is_allowed else ""


def kernel_remedy() -> str:
    """Return what to do about refused kernels: Triton compiles their launcher with a C compiler."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    missing = [name for name, there in (("gcc", compiler), ("python3-dev", headers)) if not there]
    if missing:
        packages = " ".join(missing)
        return f"Install what Triton compiles with; on Debian and Ubuntu: `sudo apt install {packages}`."
    return "trainer.log has the whole error. model.kernels = torch leaves them off without this warning."


def _try_kernels(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """Return the kernels, or why they are refused; neither where there is nothing to try."""
    # Triton's interpreter runs on a CPU, in tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, ""
    # On older GPUs LLVM may end the process.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return None, ""
    if find_spec("triton") is None:
        return None, ""
    try:
        from qlora_tui.training.fused import triton_kernels

        wrong = _first_difference(triton_kernels, device, dtype)
    except Exception as error:
        traceback.print_exception(error)
        # A compiler shows the place in the source first.
        wrong = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return (None, wrong) if wrong else (triton_kernels, "")


def _first_difference(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernel computes something else than torch, and where; empty if none does."""
    for width in _WIDTHS:
        if wrong := _difference(kernels, device, dtype, width):
            return f"{wrong} in {width} columns"
    return ""


def _difference(kernels: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> str:
    generator = torch.Generator().manual_seed(0)
    x, up, grad = (
        torch.randn(_TOKENS, width, generator=generator).mul_(3).to(device, dtype) for _ in range(3)
    )
    weight = torch.linspace(-2, 2, width, device=device).to(dtype)
    for offset in (0.0, 1.0):
        leaf = x.double().requires_grad_()
        inverse = torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-6)
        expected = leaf * inverse * (weight.double() + offset)
        expected.backward(grad.double())  # type: ignore[no-untyped-call]  # torch's own
        out, inv_rms = kernels.rms_norm(x, weight, 1e-6, offset=offset, in_fp32=offset > 0)
        gradient = kernels.rms_norm_backward(grad, x, weight, inv_rms, offset=offset)
        if _differs(out, expected) or _differs(gradient, leaf.grad):
            return "RMSNorm differs"
    for name, act in (("silu", functional.silu), ("gelu_tanh", _gelu_tanh)):
        gate_leaf, up_leaf = x.double().requires_grad_(), up.double().requires_grad_()
        expected = act(gate_leaf) * up_leaf
        expected.backward(grad.double())  # type: ignore[no-untyped-call]  # torch's own
        product = kernels.gated_product(x, up, name)
        grad_gate, grad_up = kernels.gated_product_backward(grad.clone(), x, up, name)
        pairs = ((product, expected), (grad_gate, gate_leaf.grad), (grad_up, up_leaf.grad))
        if any(_differs(*pair) for pair in pairs):
            return f"the gated product with {name} differs"
    return "the rotation differs" if _rotation_differs(kernels, x, grad) else ""


def _rotation_differs(kernels: ModuleType, x: Tensor, grad: Tensor) -> bool:
    """Whether rotary positions differ, over all columns of a head or the first half.

    Each row of x, (tokens, columns), holds four heads of queries and one of keys.
    """
    heads, grads = (values.view(1, _TOKENS, _HEADS, -1).transpose(1, 2) for values in (x, grad))
    width = heads.shape[-1]
    for rotary in (width, width // 2):
        angles = torch.linspace(-9, 9, _TOKENS * rotary, device=x.device).view(1, _TOKENS, rotary)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        leaf = heads.double().requires_grad_()
        expected = _rotated(leaf, cos.double(), sin.double())
        expected.backward(grads.double())  # type: ignore[no-untyped-call]  # torch's own
        out = kernels.rotate(heads[:, 1:], heads[:, :1], cos, sin)
        gradient = kernels.rotate(grads[:, 1:], grads[:, :1], cos, sin, backward=True)
        for (queries, keys), wanted in ((out, expected), (gradient, leaf.grad)):
            if _differs(torch.cat([keys, queries], dim=1), wanted):
                return True
    return False


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, tokens, width) with rotary positions in its first columns, by torch.

    cos and sin: (batch, tokens, columns).
    """
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = rotary.chunk(2, dim=-1)
    across = torch.cat((-high, low), dim=-1)
    return torch.cat((rotary * cos[:, None] + across * sin[:, None], rest), dim=-1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _differs(actual: Tensor, expected: Tensor | None) -> bool:
    assert expected is not None
    largest = expected.detach().abs().amax(-1, keepdim=True)
    tolerance = _ROUNDINGS * torch.finfo(actual.dtype).eps * largest
    # Written so that NaN counts as a difference.
    return not bool(((actual.double() - expected.detach()).abs() <= tolerance).all())
