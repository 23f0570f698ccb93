"""Creates tiny random models: real folders with weights, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tui.training.selftest import write_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "the quick brown fox jumps over the lazy dog; a wise old owl sat in an oak and said little, "
    "system user assistant question answer what who where how many is are the colour of red blue green"
)


def _settings(folder: Path) -> dict[str, Any]:
    """Write a tokenizer; return what the configs of tiny models have in common."""
    import torch

    tokenizer = write_tokenizer(folder, [_TEXT], CHAT_TEMPLATE, vocab_size=384)
    torch.manual_seed(0)
    return {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def make_tiny_model(folder: Path, **config: Any) -> Path:
    """Write a random Llama of two layers that trains in milliseconds a step; returns ``folder``.

    ``config`` overrides fields of ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**_settings(folder) | config)).save_pretrained(folder)
    return folder


def make_tiny_gemma(folder: Path) -> Path:
    """Write a random Gemma 3 of three layers, one of them without a window; returns ``folder``.

    Its norms have the weights of real ones: tens at the median, and a few of more than a thousand.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config: dict[str, Any] = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    model = Gemma3ForCausalLM(Gemma3TextConfig(**_settings(folder) | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight.copy_(torch.randn_like(weight).abs() * 0.7)
                weight[:2] = torch.tensor([1656.0, 233.0])
    model.save_pretrained(folder)
    return folder


def make_tiny_mixture(folder: Path) -> Path:
    """Write a random Qwen3-MoE of two layers with four experts each; returns ``folder``."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config: dict[str, Any] = {
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**_settings(folder) | config)).save_pretrained(folder)
    return folder
