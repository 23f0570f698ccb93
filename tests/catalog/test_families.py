"""Every family's table against the model transformers builds: each parameter by name and shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.families import FAMILY
from tests.catalog.configs import config, named_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.slow

SMALL = {
    "num_hidden_layers": 5,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 200,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
"""Sizes that no two of which are alike, so that a mix-up shows."""
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
GPT_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
LATENT = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "first_k_dense_replace": 2,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
}
OWN_NAMES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 5, "attention_types": [[["global"], 5]]},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "bloom": {"n_layer": 5, "n_head": 6},
    "opt": {"ffn_dim": 200},
    "nemotron": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "top_k_experts": 2},
    "qwen2_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_next": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"head_dim": 20}, {"tie_word_embeddings": True}],
    "lfm2": [
        {"full_attn_idxs": [2], "conv_bias": True},
        {
            "layer_types": ["conv", "full_attention", "conv", "conv", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
        {"block_ffn_dim_multiplier": 1.3, "block_ff_dim": 1000},
    ],
    "falcon": [
        {"multi_query": False},
        {"parallel_attn": False, "bias": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ],
    "opt": [
        {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ],
    "stablelm": [{"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}],
    "phi": [{"qk_layernorm": True}],
    "cohere": [{"use_qk_norm": True}],
    "gpt_bigcode": [{"multi_query": False}],
    "gpt2": [{"n_inner": 100}],
    "gemma4_text": [{"enable_moe_block": True, "attention_k_eq_v": True, "num_global_key_value_heads": 2}],
    "deepseek_v2": [{"q_lora_rank": None}],
}
BIASES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "attention_out_bias")


def _small(model_type: str) -> dict[str, Any]:
    values: dict[str, Any] = dict(SMALL)
    if model_type in ("gpt2", "gpt_bigcode", "gptj", "codegen"):
        values = {key: SMALL[common] for key, common in GPT_NAMES.items()} | {"vocab_size": 320}
    if "experts" in FAMILY[model_type].sizes:
        values |= EXPERTS
    return values | OWN_NAMES.get(model_type, {})


def _variants(model_type: str) -> list[dict[str, Any]]:
    flipped = {flag: not on for flag, on in FAMILY[model_type].flags.items() if flag in BIASES}
    return [{}, *([flipped] if flipped else []), *VARIANTS.get(model_type, [])]


def _on_meta(values: dict[str, Any]) -> PreTrainedModel:
    """The model transformers builds from a config, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        key: value for key, value in values.items() if key not in ("model_type", "quantization_config")
    }
    with torch.device("meta"):
        build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
        return build(AutoConfig.for_model(values["model_type"], **settings))


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", FAMILY)
def test_a_family_is_built_of_what_its_table_says(model_type: str) -> None:
    for variant in _variants(model_type):
        values = {"model_type": model_type, **_small(model_type), **variant}
        assert named_shapes(parse_architecture(values)) == _shapes(_on_meta(values)), variant


PUBLISHED = [
    "HuggingFaceTB/SmolLM2-135M",
    "EleutherAI/pythia-1.4b",
    "LiquidAI/LFM2-350M",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3.5-35B-A3B",
    "bigscience/bloom-560m",
    "deepseek-ai/DeepSeek-V2-Lite",
    "facebook/opt-1.3b",
    "google/gemma-2-2b",
    "google/gemma-3-4b-it",
    "google/gemma-4-26B-A4B",
    "ibm-research/PowerLM-3b",
    "microsoft/Phi-4-mini-instruct",
    "microsoft/phi-2",
    "mistralai/Mixtral-8x7B-v0.1",
    "openai-community/gpt2",
    "openai/gpt-oss-20b",
    "stabilityai/stablelm-2-1_6b",
    "tiiuae/falcon-7b",
    "zai-org/glm-4-9b-chat-hf",
]


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_named_and_quantized_as_loaded(model: str) -> None:
    """The model transformers builds, and the modules its bitsandbytes integration replaces."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    architecture = parse_architecture(config(model))
    built = _on_meta(config(model))
    assert named_shapes(architecture) == _shapes(built)

    settings: Callable[..., BitsAndBytesConfig] = BitsAndBytesConfig
    not_converted = Bnb4BitHfQuantizer.get_modules_to_not_convert(
        built, None, list(built._keep_in_fp32_modules or ())
    )
    quantized = replace_with_bnb_linear(built, not_converted, settings(load_in_4bit=True))
    replaced = {name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert {module.name for module in architecture.modules if module.quantizable} == replaced
