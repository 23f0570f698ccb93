"""One tiny random model of each of several families, with what makes each of them odd turned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_tui.recipe.schema import Lora
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.description import architecture_of

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {},
    "mistral": {"sliding_window": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
}
"""``model_type``: settings. Sliding windows are shorter than the samples of the tests."""


def with_adapter(model: Any, token_ids: Sequence[int] = (), **lora: Any) -> Any:
    """The model with an adapter of rank 4 that changes it; ``token_ids``: whose rows are trained too."""
    architecture = architecture_of(model.config.to_dict())  # of a model with random numbers, the first time
    torch.manual_seed(1)
    adapted = add_lora(model, Lora(rank=4, **lora), architecture, token_ids)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def build(model_type: str, **settings: Any) -> Any:
    """A random model, frozen, fp32, in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **FAMILIES.get(model_type, {}), **settings})
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager"
    )
    return model.float().requires_grad_(False).eval()
