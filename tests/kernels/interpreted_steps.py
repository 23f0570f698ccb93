"""Runs steps with Triton's kernels under its interpreter, and without; prints one line of JSON per case.

Needs ``TRITON_INTERPRET=1`` in the environment before torch and Triton are imported.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training.fused import kernel_choice, triton_kernels
from qlora_tui.training.fused.norm_rotary import fuse_rotary
from qlora_tui.training.fused.patching import PatchedForwards
from qlora_tui.training.model import checkpoint_activations
from tests.kernels.compiling import SOURCE, load
from tests.training.families import build, with_adapter

CPU = torch.device("cpu")
KERNELS = ("rms_norm", "rms_norm_backward", "gated_product", "gated_product_backward", "rotate")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {},
    "qwen3": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
"""A plain one, one with two tables of angles, one with norms of heads, one that rotates half of each head."""
DTYPES = (torch.float32, torch.float16)
WIDTHS = (20, 40, 200, 1040, 2500, 5000, 9000, 16380)
"""One for each number of rows and warps of a program."""
PLANTED_WIDTHS = kernel_choice._WIDTHS
MUTANTS = {
    "mean over the block": ("keep_dims=True) / width + eps", "keep_dims=True) / BLOCK + eps"),
    "row without its last column": ("(row < rows) & (i < width)", "(row < rows) & (i < width - 1)"),
    "weight without offset": ("other=0.0).to(tl.float32) + offset", "other=0.0).to(tl.float32)"),
    "gradient without projection": ("(scaled - normed * projection)", "scaled"),
    "every program its first row": ("+ tl.arange(0, ROWS)[:, None]", "+ 0 * tl.arange(0, ROWS)[:, None]"),
    "derivative of gelu": ("0.134145", "0.044715"),
    "derivative of silu": ("gate * (1.0 - sigmoid)", "(1.0 - sigmoid)"),
    "rotation backward": ("high * sin_high, -(low * sin_low)", "-(high * sin_high), low * sin_low"),
    "columns that are not rotated": ("if REST > 0:", "if REST < 0:"),
}
"""Changes of the source, as text before and after."""


def step(
    family: str, dtype: torch.dtype, calls: dict[str, int], *, kernels: bool, **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """Logits of a step, and the gradients of the adapter. ``calls`` are then those of the step alone."""
    kernel_choice.allow_kernels(kernels)
    model = with_adapter(build(family, **settings).to(dtype), dropout=0.1).train()
    checkpoint_activations(model.get_base_model())
    calls.update(dict.fromkeys(calls, 0))
    torch.manual_seed(5)
    ids = torch.arange(3, 43)[None]
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of two tensors, as a share of the size of the second."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def compare(family: str, dtype: torch.dtype, **settings: Any) -> dict[str, Any]:
    """How far a step with the kernels is from one without."""
    calls = count_calls()
    logits, grads = step(family, dtype, calls, kernels=True, **settings)
    used = dict(calls)
    expected, expected_grads = step(family, dtype, calls, kernels=False, **settings)
    return {
        "logits": distance(logits, expected),
        "gradients": max(map(distance, grads, expected_grads)),
        "calls": used,
        "calls_without": dict(calls),
    }


def count_calls() -> dict[str, int]:
    """Counts from now on how often each function of the kernels is called."""
    calls = dict.fromkeys(KERNELS, 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            calls[name] += 1
            return function(*args, **settings)

        return call

    for name in KERNELS:
        function = getattr(triton_kernels, name)
        setattr(triton_kernels, name, counted(name, getattr(function, "plain", function)))
        vars(triton_kernels)[name].plain = getattr(function, "plain", function)
    return calls


def rotation_error(dtype: torch.dtype, *, rotary: int, rows: int, tables: int, backward: bool) -> float:
    """How far a rotation of grouped heads in odd layouts is from float64."""
    generator = torch.Generator().manual_seed(0)
    width, tokens = 24, 7
    projected = torch.randn(rows, tokens, 8, width, generator=generator).to(dtype)
    q, k = projected[:, :, :6].transpose(1, 2), projected[:, :, 6:].transpose(1, 2).contiguous()
    cos, sin = torch.randn(2, tables, tokens, rotary, generator=generator).to(dtype)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    expected = [kernel_choice._rotated(x, cos.double(), sin.double()) for x in leaves]
    if backward:
        expected = list(torch.autograd.grad(expected, leaves, [x.double() for x in (q, k)]))
    out = triton_kernels.rotate(q, k, cos, sin, backward=backward)
    return max(map(distance, out, (x.detach() for x in expected)))


def left_to_torch() -> list[str]:
    """Families whose rotary positions the kernel does not compute."""
    kernel_choice.allow_kernels(True)
    kernel_choice.verify_kernels(CPU, torch.float32)
    models = {family: build(family) for family in ("llama", "gemma2", "mistral", "cohere", "gpt_oss")}
    for model in models.values():
        fuse_rotary(model, CPU, torch.float32)
    return [family for family, model in models.items() if not len(PatchedForwards(model, "rotary"))]


def is_refused(right: str, wrong: str) -> bool:
    """Whether the check before use refuses the kernels with this change of their source."""
    source = SOURCE.read_text()
    assert right in source, right
    with TemporaryDirectory() as folder:
        planted = Path(folder) / "planted.py"
        planted.write_text(source.replace(right, wrong))
        # The interpreter reads the source again at each launch.
        return bool(kernel_choice._first_difference(load(planted), CPU, torch.float32))


def main() -> None:
    """Every case."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    for family, settings in FAMILIES.items():
        for dtype in DTYPES:
            result = compare(family, dtype, **settings)
            print(json.dumps({"case": f"{family} {str(dtype)[6:]}"} | result), flush=True)
    shapes = itertools.product(DTYPES, (24, 10), ((1, 1), (3, 1), (3, 3)), (False, True))
    error = max(
        rotation_error(dtype, rotary=rotary, rows=rows, tables=tables, backward=backward)
        / torch.finfo(dtype).eps
        for dtype, rotary, (rows, tables), backward in shapes
    )
    print(json.dumps({"case": "rotation", "roundings": error}), flush=True)
    print(json.dumps({"case": "left to torch", "families": left_to_torch()}), flush=True)
    for dtype in DTYPES:
        kernel_choice._WIDTHS = WIDTHS
        wrong = kernel_choice._first_difference(triton_kernels, CPU, dtype)
        print(json.dumps({"case": f"widths {str(dtype)[6:]}", "wrong": wrong}), flush=True)
    kernel_choice._WIDTHS = PLANTED_WIDTHS
    for name, change in MUTANTS.items():
        print(json.dumps({"case": f"mutant {name}", "refused": is_refused(*change)}), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
