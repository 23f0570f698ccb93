"""Tiny models of families that differ in structure, with weights of the shape that trained models have.

Random initialization hides mistakes: norm weights of 1, logits that never leave the linear part of a soft
cap, scores near 0. Trained models have heavy tails everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import nn

from tests.training.families import FAMILIES, build

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
_DELTA: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
CLAIMED: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere2": {
        "sliding_window": 8,
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": {},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4": {"head_dim": 16},
    "gpt2": {"n_head": 4, "n_layer": 2},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {},
    "gptj": {"n_head": 4, "n_layer": 2, "rotary_dim": 8},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 4, "residual_multiplier": 0.3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mixtral": {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {"clip_qkv": 8.0},
    "olmo2": {},
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA,
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "seed_oss": {"head_dim": 16, "residual_dropout": 0.1},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
}
"""``model_type``: settings, of text models of which no two compute alike."""

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 2.0 * n for n in range(8)],
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}
LENGTH_SCALED: dict[str, dict[str, Any]] = {
    "phi3 longrope": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 20,
        "rope_parameters": _LONGROPE,
    },
    "llama dynamic": {"max_position_embeddings": 20, "rope_parameters": _DYNAMIC},
    "gemma3_text dynamic": {
        "max_position_embeddings": 20,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": _DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
}
"""Rotary frequencies that follow from the length of a sequence, beyond 20 tokens."""


def build_with_trained_weights(model_type: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny frozen model in eval mode, with weights as :func:`give_trained_weights` makes them."""
    return give_trained_weights(build(model_type, **{**CLAIMED[model_type], **settings}), dtype)


@torch.no_grad()
def give_trained_weights(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model with outliers: norm weights to 2,000, massive channels, sharp attention, large embeddings."""
    generator = torch.Generator().manual_seed(4)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if weight.dim() == 1 and "Norm" in type(module).__name__:
            weight.copy_(trained_norm_weight(len(weight), generator))
        elif isinstance(module, nn.Embedding):
            weight.mul_(5)
            weight[::37] *= 20
        elif name.endswith(("q_proj", "k_proj")):
            weight.mul_(2)
        elif name.endswith("down_proj") and weight.dim() == 2:
            weight[weight.shape[0] // 3] *= 50
    return model.to(dtype)


def trained_norm_weight(width: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """As Gemma-3-270M's after the feed-forward: most of 0.1 to 10, some in the hundreds, one of 2,000."""
    generator = generator or torch.Generator().manual_seed(2)
    weight = torch.randn(width, generator=generator).mul_(1.5).exp_()
    weight[:: max(width // 8, 1)] *= 50
    weight[width // 2] = 2000.0
    return weight


def in_turns(dtypes: Sequence[torch.dtype]) -> list[tuple[str, torch.dtype]]:
    """Each family with one of the dtypes, which take turns."""
    return list(zip(CLAIMED, cycle(dtypes), strict=False))
