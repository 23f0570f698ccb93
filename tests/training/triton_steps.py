"""Runs steps with Triton's kernels under its interpreter, and without; prints one line of JSON per case.

Needs ``TRITON_INTERPRET=1`` in the environment before torch and Triton are imported.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training.fused import kernel_choice, triton_kernels
from qlora_tui.training.model_loading import checkpoint_activations
from tests.training.families import build, with_adapter

CPU = torch.device("cpu")


def step(family: str, dtype: torch.dtype, *, kernels: bool, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits of a step, and the gradients of the adapter."""
    kernel_choice.allow_kernels(kernels)
    model = with_adapter(build(family, **settings).to(dtype), dropout=0.1).train()
    checkpoint_activations(model.get_base_model())
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
    logits, grads = step(family, dtype, kernels=True, **settings)
    used = dict(calls)
    expected, expected_grads = step(family, dtype, kernels=False, **settings)
    return {
        "logits": distance(logits, expected),
        "gradients": max(map(distance, grads, expected_grads)),
        "calls": used,
        "calls_without": {name: calls[name] - used[name] for name in calls},
    }


def count_calls() -> dict[str, int]:
    """Counts from now on how often each function of the kernels is called."""
    names = ("rms_norm", "rms_norm_backward", "gated_product", "gated_product_backward")
    calls = dict.fromkeys(names, 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            calls[name] += 1
            return function(*args, **settings)

        return call

    for name in names:
        function = getattr(triton_kernels, name)
        setattr(triton_kernels, name, counted(name, getattr(function, "plain", function)))
        vars(triton_kernels)[name].plain = getattr(function, "plain", function)
    return calls


def mutant(name: str) -> bool:
    """Whether the check before use refuses the kernels with one of them wrong."""
    right = getattr(triton_kernels, name)

    def wrong(*args: Any, **settings: Any) -> Any:
        result = right(*args, **settings)
        if isinstance(result, tuple):
            return (result[0] * 1.05, *result[1:])
        return result * 1.05

    setattr(triton_kernels, name, wrong)
    try:
        return kernel_choice._working_kernels(CPU, torch.float32) is None
    finally:
        setattr(triton_kernels, name, right)


def main() -> None:
    """Every case."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    for family in ("llama", "gemma3_text", "qwen3"):
        for dtype in (torch.float32, torch.float16):
            result = compare(family, dtype)
            print(json.dumps({"case": f"{family} {str(dtype)[6:]}"} | result), flush=True)
    for name in ("rms_norm", "rms_norm_backward", "gated_product", "gated_product_backward"):
        print(json.dumps({"case": f"mutant {name}", "refused": mutant(name)}), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
