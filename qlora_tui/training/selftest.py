"""``python -m qlora_tui.training.selftest``: tries on a few weights whether training works here.

Prints one JSON list of checks on the last line; run by ``qlora-tui doctor``, so that a crash in a native
library is a finding and not the doctor's end.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qlora_tui.gpu.torch_env import configure_torch_env
from qlora_tui.installation import install_command


def main() -> int:
    """Run every check; always 0, since the findings are the outcome."""
    # Libraries print to stdout, where only the checks may be.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    configure_torch_env()
    checks = [_library(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets")]
    if all(check["outcome"] == "ok" for check in checks):
        checks += [_run_check("torch on the GPU", _gpu), _run_check("NF4 forward and backward", _nf4)]
        if checks[-2]["outcome"] != "error":
            checks.append(_run_check("flash attention", _flash))
            checks.append(_run_check("copies to the GPU", _transfer))
    out.write(json.dumps(checks) + "\n")
    out.flush()
    return 0


def _library(name: str) -> dict[str, str]:
    try:
        importlib.import_module(name)
        return {"name": name, "outcome": "ok", "text": version(name)}
    except PackageNotFoundError:
        return {"name": name, "outcome": "ok", "text": "version unknown"}
    except Exception as error:  # whatever a broken native library raises
        return {"name": name, "outcome": "error", "text": f"{error}", "fix": install_command(name)}


def _run_check(name: str, check: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return {"name": name} | check()
    except Exception as error:  # a failure is the finding
        return {
            "name": name,
            "outcome": "error",
            "text": f"{type(error).__name__}: {error}",
            "fix": install_command("torch", "bitsandbytes"),
        }


def _gpu() -> dict[str, str]:
    import torch

    from qlora_tui.errors import UserError
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training.compute_device import find_device

    try:
        device = find_device(Recipe())
    except UserError as problem:
        return {"outcome": "error", "text": f"{problem.what} {problem.why}".rstrip(), "fix": problem.fix}
    if device.kind == "cpu":
        return {"outcome": "note", "text": f"torch {torch.__version__} runs on the CPU"}
    major, minor = torch.cuda.get_device_capability()
    return {
        "outcome": "ok",
        "text": f"{device.name}, CUDA {torch.version.cuda}, compute capability {major}.{minor}",
    }


def _nf4() -> dict[str, str]:
    import bitsandbytes as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dense = torch.randn(256, 256)
    layer: Any = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    inputs = torch.randn(4, 256, device=device, requires_grad=True)
    layer(inputs).square().sum().backward()
    exact = (inputs.detach().cpu() @ dense.T).norm()
    off = float((layer(inputs).detach().cpu() - inputs.detach().cpu() @ dense.T).norm() / exact)
    finite = inputs.grad is not None and bool(torch.isfinite(inputs.grad).all())
    # NF4 of normal weights is off by about a tenth (QLoRA paper, section 3).
    if off > 0.2 or not finite:
        return {"outcome": "error", "text": f"wrong by {off:.0%}", "fix": install_command("bitsandbytes")}
    return {
        "outcome": "ok",
        "text": f"on {device}; the result is {off:.0%} off that of unquantized weights, as expected",
    }


def _flash() -> dict[str, str]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training import varlen_attention
    from qlora_tui.training.compute_device import find_device, why_no_flash
    from qlora_tui.training.packed_attention import segment_mask

    device = find_device(Recipe())
    if reason := why_no_flash(device):
        return {"outcome": "note", "text": f"attention uses SDPA. {reason}"}
    lengths, width = [5, 9], 64
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), width, device=device.torch_device, dtype=device.dtype)
        for heads in (4, 2, 2)
    )
    leaf = query.clone().requires_grad_()
    out = varlen_attention.attend(leaf, key, value, segment_mask(lengths), width**-0.5, None)
    out.float().square().sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    kv_samples = zip(*(torch.split(x.repeat_interleave(2, 1), lengths, 2) for x in (key, value)), strict=True)
    parts = [
        scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        for q, (k, v) in zip(torch.split(query, lengths, 2), kv_samples, strict=True)
    ]
    exact = torch.cat(parts, 2)
    off = float((out.detach().float() - exact.transpose(1, 2)).norm() / exact.norm())
    finite = leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())
    if off > 0.02 or not finite:
        return {"outcome": "error", "text": f"wrong by {off:.0%}", "fix": 'Set model.attention to "sdpa".'}
    return {"outcome": "ok", "text": "one call for all samples of a packed sequence"}


def _transfer() -> dict[str, str]:
    """Measure what the estimate says of streamed layers, and record it."""
    from qlora_tui.memory.transfer_speed import record_speed
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training.compute_device import find_device
    from qlora_tui.training.streaming.speed_measurement import measure_speed

    device = find_device(Recipe())
    if device.kind == "cpu":
        return {"outcome": "note", "text": "not measured: streamed layers save memory on a GPU only"}
    speed = measure_speed(device)
    record_speed(device.name, speed)
    copies, products = f"{speed.bytes_per_s / 1e9:.1f} GB/s", f"{speed.flops_per_s / 1e12:.1f} TFLOP/s"
    return {
        "outcome": "ok",
        "text": f"{copies} from pinned memory, and {products} in {device.dtype_name}: how much slower "
        "streamed layers are follows from both",
    }


if __name__ == "__main__":
    sys.exit(main())
