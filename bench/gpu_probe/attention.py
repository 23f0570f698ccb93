"""Questions about the kernels of attention."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu_probe.length_timer import LENGTHS
from bench.gpu_probe.probe import Answer, Probe, attention_inputs, relative_difference
from bench.support.child_processes import ROOT, python_module
from qlora_tui.gpu.torch_env import FLASH_BEFORE_CUDNN

_KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_TORCHS_OWN_ORDER = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0", "TORCH_CUDNN_SDPA_PREFERRED": "1"}
_ROW_TOKENS = 2048
_TIMER_S = 120


def new_lengths(probe: Probe) -> Answer:
    """Seconds of forward and backward at each new length: in torch's own order of kernels, and in ours."""
    answer: Answer = {"lengths": list(LENGTHS)}
    for name, variables in (("torchs_order", _TORCHS_OWN_ORDER), ("our_order", FLASH_BEFORE_CUDNN)):
        done = subprocess.run(
            python_module("bench.gpu_probe.length_timer"),
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | variables,
            timeout=_TIMER_S,
        )
        answer[name] = json.loads(done.stdout.splitlines()[-1])
    return answer


def attention_kernels(probe: Probe) -> Answer:
    """GiB of a forward and backward of each kernel with grouped heads, or why it refuses."""
    tokens = _ROW_TOKENS // 2 if probe.on_gpu else 16
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=probe.device).tril()
    masks: dict[str, dict[str, Any]] = {"causal": {"is_causal": True}, "mask": {"attn_mask": mask}}
    answer: Answer = {}
    for name, settings in masks.items():
        for heads in ("grouped", "repeated"):
            for kernel in _KERNELS:
                call = partial(_attend, probe, tokens, kernel, settings, grouped=heads == "grouped")
                try:
                    answer[f"{heads}, {name}, {kernel}"] = probe.peak_gib(call)
                except RuntimeError as error:
                    answer[f"{heads}, {name}, {kernel}"] = f"refuses: {error}"[:120]
    return answer


def _attend(probe: Probe, tokens: int, kernel: str, settings: dict[str, Any], *, grouped: bool) -> None:
    query, key, value = attention_inputs(probe, tokens, key_heads=8 if grouped else 32)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **settings).sum().backward()


def varlen_attention(probe: Probe) -> Answer:
    """Milliseconds of forward and backward of a packed sequence, with one call a sample and in one call."""
    tokens = _ROW_TOKENS if probe.on_gpu else 32
    answer: Answer = {"schema": str(torch.ops.aten._flash_attention_forward.default._schema)[:400]}
    for samples in (1, 4, 8, 16):
        lengths = [tokens // samples] * samples
        inputs = attention_inputs(probe, tokens)
        seed = torch.randn(1, tokens, 32, 128, device=probe.device, dtype=torch.bfloat16)
        row: Answer = {}
        results = []
        for name, attend in (("by_sample", _by_sample), ("in_one_call", _in_one_call)):
            call = partial(_gradients, attend, inputs, lengths, seed)
            try:
                results.append(call())
                row[f"{name}_ms"] = round(probe.milliseconds(call), 3)
            except (RuntimeError, NotImplementedError) as error:
                row[name] = str(error)[:120]
        if len(results) == 2:
            row["differences"] = [relative_difference(b, a) for a, b in zip(*results, strict=True)]
        answer[f"{samples} samples"] = row
    return answer


def _gradients(
    attend: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], lengths: list[int], seed: Tensor
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of query, key and value."""
    output = attend(*inputs, lengths)
    return output, *torch.autograd.grad(output, inputs, seed)


def _by_sample(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    split = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat(parts, 1)


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    starts = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    longest, scale = max(lengths), query.shape[-1] ** -0.5
    output: Tensor = torch.ops.aten._flash_attention_forward(
        *rows, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return output[None]
