"""Files of a tiny gpt-oss as OpenAI stores it: experts in MXFP4, and the same model in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.training.families import build

_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
_SMALL_SCALES = (118, 124)
"""Exponents with a bias of 127: weights of up to 0.75, as a trained model has."""


def mxfp4_tensors(experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Random blocks (experts, outputs, inputs / 32, 16) and scales (experts, outputs, inputs / 32), uint8."""
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(*_SMALL_SCALES, (experts, outputs, inputs // 32), dtype=torch.uint8)
    return blocks, scales


def save_both(folder: Path, **settings: int) -> tuple[Path, Path]:
    """Write the model with MXFP4 experts, and with what transformers makes of them in bfloat16."""
    packed, plain = folder / "mxfp4", folder / "bfloat16"
    build("gpt_oss", intermediate_size=64, **settings).bfloat16().save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks, scales = mxfp4_tensors(experts, outputs, inputs)
        tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    packed.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": _CONFIG}))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    return packed, plain
