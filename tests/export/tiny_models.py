"""Tiny random models of every type that GGUF export knows, with constants and norms far from neutral ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_tui.training.selftest import write_tokenizer
from tests.training.tiny_model import CHAT_TEMPLATE

TEXT = "the quick brown fox jumps over the lazy dog; a wise old owl sat in an oak and said little"
SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
GEMMA_4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": 384,
}
GEMMA_3N: dict[str, Any] = {
    "head_dim": 16, "sliding_window": 24, "num_hidden_layers": 22, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 380, "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 4
    + ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
    "intermediate_size": 4096, "initializer_range": 0.02,
}  # fmt: skip
"""With the number of layers that llama.cpp has built in. It divides by n - 1 where transformers divides by n,
which shows in a narrow layer."""
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64
}  # fmt: skip
MSCALE: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 1.0}
EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32
}  # fmt: skip
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 64}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "routed_scaling_factor": 1.5, "num_hidden_layers": 3, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "head_dim": 32, "num_hidden_layers": 5,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_state": 32, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16
}  # fmt: skip
NEMOTRON: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32,
    "n_groups": 2, "chunk_size": 16,
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
}  # fmt: skip
GRANITE_HYBRID: dict[str, Any] = {
    **GRANITE, **MAMBA, "shared_intermediate_size": 64, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
NO_EXPERTS: dict[str, Any] = {"num_local_experts": 0, "num_experts_per_tok": 0}
CONVOLUTIONS: dict[str, Any] = {
    "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]
}  # fmt: skip
FALCON_H1: dict[str, Any] = {
    **MAMBA, "mamba_d_ssm": 128, "head_dim": 16, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5,
    "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 0.5], "mlp_multipliers": [0.7, 0.6], "key_multiplier": 0.4,
    "attention_in_multiplier": 0.9, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.3,
}  # fmt: skip
LLAMA_4: dict[str, Any] = {
    "head_dim": 32, "num_local_experts": 8, "intermediate_size": 64, "intermediate_size_mlp": 128
}  # fmt: skip
SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER: dict[str, Any] = {
    "depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
    "num_attention_heads": 2, "out_hidden_size": 64, "image_size": 28, "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}  # fmt: skip
UNLIKE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("ministral3", {"head_dim": 32}),
    ("mistral4", ROUTED | LATENT | {"rope_parameters": YARN | MSCALE | {"llama_4_scaling_beta": 0.1}}),
    ("granitemoeshared", GRANITE | {"num_local_experts": 8, "shared_intermediate_size": 64}),
    ("granitemoehybrid", GRANITE_HYBRID | NO_EXPERTS),
    ("qwen3_5_text", LINEAR),
    ("gemma2", GEMMA | {
        "num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    ("gemma3_text", GEMMA | {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }, "num_hidden_layers": 7}),
    ("gemma3n_text", GEMMA_3N),
    ("gemma4_text", GEMMA_4 | EXPERTS | {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}),
    ("phi3", {"rope_parameters": LONG}),
    ("olmo", {"clip_qkv": 0.5}),
    ("apertus", {}),
    ("gpt_oss", {"head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 24,
                 "num_hidden_layers": 3, "rope_parameters": YARN}),
    ("lfm2_moe", CONVOLUTIONS | EXPERTS | {"num_dense_layers": 1}),
    ("falcon_h1", FALCON_H1),
    ("gpt_neox", {"num_key_value_heads": 4}),
    ("qwen3_vl_moe", {"text_config": SIZES | EXPERTS | {"head_dim": 16}, "vision_config": TOWER}),
    ("afmoe", EXPERTS | {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 5, "mup_enabled": True,
                         "route_scale": 1.5}),
    ("exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("llama4_text", LLAMA_4 | {"num_hidden_layers": 5, "interleave_moe_layer_step": 1}),
    ("mimo_v2_flash", EXPERTS | {
        "n_routed_experts": 8, "num_hidden_layers": 7, "num_key_value_heads": 1, "head_dim": 32,
        "v_head_dim": 16, "sliding_window": 24, "attention_value_scale": 0.5, "n_group": 2, "topk_group": 1}),
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "num_key_value_heads": None}),
    ("falcon", {"num_kv_heads": 4, "multi_query": False}),
]  # fmt: skip
"""Models that together have every rule, constant and fixed setting of the conventions."""
MODELS: list[tuple[str, dict[str, Any]]] = [
    *UNLIKE,
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": 32}),
    ("mixtral", {"num_local_experts": 8}),
    ("ministral", {"head_dim": 16, "sliding_window": 512}),
    ("iquestcoder", {}),
    ("internlm3", {"head_dim": 16, "qkv_bias": True, "bias": True}),
    ("helium", {"head_dim": 16}),
    ("arcee", {}),
    ("smollm3", {"num_hidden_layers": 5}),
    ("ministral3", {"rope_parameters": YARN | MSCALE | {"llama_4_scaling_beta": 0.1}}),
    ("granite", GRANITE),
    ("granitemoe", GRANITE | {"num_local_experts": 8}),
    ("granitemoehybrid", GRANITE_HYBRID | {"num_local_experts": 8}),
    ("granitemoehybrid", GRANITE_HYBRID | NO_EXPERTS | {
        "layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"}),
    ("bamba", MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]}),
    ("qwen2", {}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"head_dim": 32}),
    ("qwen2_moe", EXPERTS | SHARED),
    ("qwen3_moe", EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
    ("qwen3_next", LINEAR | EXPERTS | SHARED),
    ("qwen3_5_text", LINEAR | {
        "num_hidden_layers": 4, "layer_types": ["full_attention", "linear_attention"] * 2}),
    ("qwen3_5_moe_text", LINEAR | EXPERTS | SHARED),
    ("gemma", {"head_dim": 32}),
    ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    ("gemma4_text", GEMMA_4 | {
        "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "final_logit_softcapping": 10.0}),
    ("gemma4_unified_text", GEMMA_4 | {"hidden_size_per_layer_input": 0}),
    ("phi3", {}),
    ("olmo2", {}),
    ("olmo3", {"sliding_window": 24, "num_hidden_layers": 5}),
    ("olmoe", EXPERTS | {"num_key_value_heads": 4}),
    ("glm", {"head_dim": 16}),
    ("glm4", {"head_dim": 16}),
    ("glm4_moe", ROUTED | {"head_dim": 16}),
    ("glm4_moe_lite", ROUTED | LATENT | {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    ("deepseek_v2", ROUTED | LATENT),
    ("deepseek_v3", ROUTED | LATENT | {"n_group": 2, "topk_group": 1}),
    ("deepseek_v3", ROUTED | LATENT | {"n_group": 1, "topk_group": 1, "rope_parameters": YARN | MSCALE}),
    ("youtu", LATENT),
    ("seed_oss", {"head_dim": 32}),
    ("apertus1p5_text", {}),
    ("ernie4_5", {"head_dim": 16}),
    ("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3,
                      "moe_layer_end_index": 2}),
    ("lfm2", CONVOLUTIONS),
    ("nemotron_h", NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}),
    ("nemotron_h", NEMOTRON | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_routed_experts": 8,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
        "routed_scaling_factor": 1.5}),
    ("cohere", {}),
    ("cohere2", {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 5}),
    ("starcoder2", {}),
    ("stablelm", {}),
    ("stablelm", {"use_parallel_residual": True}),
    ("nemotron", {"head_dim": 16}),
    ("phi", {}),
    ("gpt_neox", {"num_key_value_heads": 4, "use_parallel_residual": False}),
    ("hunyuan_v1_dense", {"head_dim": 16}),
    ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2, "head_dim": 16}),
    ("qwen2_5_vl", {"text_config": SIZES | {"rope_parameters": SECTIONS}, "vision_config": TOWER}),
    ("qwen3_vl", {"text_config": SIZES | {"head_dim": 16}, "vision_config": TOWER}),
    ("glm4v", {"text_config": SIZES | {"head_dim": 16, "rope_parameters": SECTIONS}, "vision_config": TOWER}),
    ("gemma3", {"text_config": SIZES | GEMMA | {"num_hidden_layers": 7}, "vision_config": TOWER}),
    ("exaone4", {"head_dim": 16, "num_hidden_layers": 64, "sliding_window": 24}),
    ("llama4_text", LLAMA_4 | {"num_hidden_layers": 6, "interleave_moe_layer_step": 2}),
    ("solar_open", ROUTED | {"head_dim": 16, "first_k_dense_replace": 0}),
    ("exaone", {}),
    ("exaone_moe", ROUTED | {
        "head_dim": 16, "sliding_window": 24, "num_experts": 8, "num_shared_experts": 1,
        "num_hidden_layers": 5, "n_group": 2, "topk_group": 1}),
    ("jais2", {"head_dim": 16}),
    ("bloom", {"n_layer": 2, "n_head": 4, "num_key_value_heads": None}),
    ("minicpm3", LATENT),
    ("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512,
                     "num_key_value_heads": 1}),
    ("mamba", {"time_step_rank": 4, "state_size": 16, "intermediate_size": 128}),
    ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 32, "n_groups": 2, "chunk_size": 16}),
    ("minimax_m2", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}),
    ("dots1", ROUTED | {"num_key_value_heads": 4, "norm_topk_prob": True}),
    ("llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"num_hidden_layers": 5, "rope_parameters": YARN}),
    ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
]  # fmt: skip
"""Models of every type, and of every form of it."""
QUICK = (
    "llama",
    "gemma3_text",
    "gemma4_text",
    "qwen3_5_text",
    "gpt_oss",
    "falcon_h1",
    "lfm2_moe",
    "deepseek_v3",
)
"""Types that have something of every convention."""


def make_model(folder: Path, model_type: str, **settings: Any) -> Any:
    """Write a random model with weights and norms far from their initial values; returns it in float32."""
    write_tokenizer(folder, [TEXT], CHAT_TEMPLATE, vocab_size=384)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**({} if "text_config" in settings else SIZES), **settings})
    is_composite = type(config) not in AutoModelForCausalLM._model_mapping
    kind: Any = AutoModelForImageTextToText if is_composite else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager")
    randomize(model).save_pretrained(folder)
    return model


def randomize(model: Any) -> Any:
    """Give a model weights and norms far from their initial values; returns it in float32."""
    model = model.float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
            elif weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.2)
            # Values that float16 holds exactly.
            weight.copy_(weight.half().float())
    return model
