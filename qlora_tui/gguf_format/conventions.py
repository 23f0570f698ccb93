"""llama.cpp's architecture for each model type, and what it has of its own.

Names of tensors come from the tables of the ``gguf`` package. What is declared here is what no table says:
rules of ``rewrites``, constants, and settings that llama.cpp has no key for. How each architecture is
computed: llama.cpp, src/models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

from qlora_tui.errors import UserError
from qlora_tui.gguf_format.rewrites import (
    ALONE,
    FALCON,
    FALCON_H1,
    GEMMA,
    GEMMA3N,
    GEMMA4,
    GPT2,
    GPT_OSS,
    INPUTS_FIRST,
    MAMBA2,
    MLA,
    NEOX,
    PAIRS,
    QWEN3_NEXT,
    QWEN35,
    SHARED,
    SINKS,
    TRANSPOSED_EXPERTS,
    Rewrite,
    falcon_key_heads,
)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What one of llama.cpp's architectures has of its own."""

    architecture: str
    """``general.architecture``."""
    types: tuple[str, ...] = ()
    """transformers' model types, if not only the one that is spelled like the architecture."""
    when: Callable[[Any], bool] = lambda config: True
    """Whether it is the one for a config of these types."""
    rewrites: tuple[Rewrite, ...] = ()
    reads: frozenset[str] = frozenset()
    """Constants that it reads besides those that every architecture reads."""
    folded: frozenset[str] = frozenset()
    """Settings of the config that ``rewrites`` or ``keys`` account for."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it has no key for, with the value it computes with, if that of the class is another
    one or is not looked at."""
    windows: bool = False
    """Whether it computes sliding windows."""
    kv_by_layer: bool = False
    """Whether it recognizes layers without attention by their number of key heads, which is 0."""
    dense_layers: Literal["", "first", "any"] = ""
    """Which layers of a mixture may have no experts."""
    yarn_multiplier: float = 0.0
    """What ``mscale_all_dim`` is multiplied by in ``yarn_log_multiplier``; 0 if it does not read that."""
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Constants that are not a setting as it stands; may raise UserError."""
    unused: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    """Shapes of tensors that it loads and does not compute with, by name in the file."""
    scalars: Mapping[str, str] = field(default_factory=dict)
    """Ends of names of tensors that hold one number in each layer, with the key that has all of them."""


def cannot_compute(why: str) -> UserError:
    """Return the error of a model that llama.cpp would compute otherwise."""
    return UserError(
        "This model cannot be exported as GGUF",
        what=f"llama.cpp cannot compute it: {why}.",
        fix="Export it with `qlora-tui export merge`; transformers and vLLM can load that folder.",
    )


def _no_rope_every_fourth(config: Any) -> dict[str, Any]:
    usual = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != usual:
        raise cannot_compute("the layers without rotary embedding are not exactly every fourth one")
    return {}


_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Number of layers by which llama.cpp recognizes the 27B, whose attention it scales otherwise."""


def _gemma_scale(architecture: str) -> Callable[[Any], dict[str, Any]]:
    def keys(config: Any) -> dict[str, Any]:
        is_27b = config.num_hidden_layers == _GEMMA_27B[architecture]
        scaled_by = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        if config.query_pre_attn_scalar != scaled_by:
            raise cannot_compute(
                f"its attention is scaled by {config.query_pre_attn_scalar}, not {scaled_by}"
            )
        return {}

    return keys


def _first_shared_layer(config: Any) -> int:
    """Return the first layer that computes with the keys and values of an earlier one. Raises UserError."""
    first: int = config.num_hidden_layers - config.num_kv_shared_layers
    if config.layer_types[first - 2 : first] != ["sliding_attention", "full_attention"]:
        raise cannot_compute("its last layers do not share the keys and values of the two before them")
    return first


_GEMMA_3N = {"altup_num_inputs": 4, "altup_active_idx": 0, "laurel_rank": 64} | {
    "hidden_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}
"""Settings of Gemma 3n that llama.cpp has built in (src/models/gemma3n.cpp, src/llama-hparams.h)."""
_SPARSE_LAYERS, _SPARSITY, _FIRST_SHARED = 10, 0.95, 20


def _gemma3n(config: Any) -> dict[str, Any]:
    """Return what Ollama reads of Gemma 3n, whose layers llama.cpp tells apart by their number."""
    sparsity = list(config.activation_sparsity_pattern)
    if [share == _SPARSITY for share in sparsity] != [
        layer < _SPARSE_LAYERS for layer in range(len(sparsity))
    ]:
        raise cannot_compute("its sparse layers are not exactly the first ten, of 95 %")
    if (first := _first_shared_layer(config)) != _FIRST_SHARED:
        raise cannot_compute(f"its layers share keys and values from {first} on, not from {_FIRST_SHARED}")
    return {
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "activation_sparsity_scale": [NormalDist().inv_cdf(share) if share else 0.0 for share in sparsity],
    }


def _keys_of_shared_layers(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the projections of layers that share keys and values; weight files may not have them."""
    rows = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_k": (rows, config.hidden_size),
        "attn_k_norm": (config.head_dim,),
        "attn_v": (rows, config.hidden_size),
    }
    layers = range(_FIRST_SHARED, config.num_hidden_layers)
    return {f"blk.{layer}.{name}.weight": shape for layer in layers for name, shape in shapes.items()}


def _gemma4(config: Any) -> dict[str, Any]:
    """Return the sizes of heads, which differ between layers with a window and those without one."""
    if config.use_bidirectional_attention == "all":
        raise cannot_compute("a token attends to those after it")
    if getattr(config, "num_kv_shared_layers", 0):
        _first_shared_layer(config)
    full = config.per_layer_config["full_attention"].head_dim
    layers = range(config.num_hidden_layers)
    return {
        "attention.head_count_kv": [config.per_layer_config[layer].num_key_value_heads for layer in layers],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": config.head_dim,
        "embedding_length_per_layer_input": getattr(config, "hidden_size_per_layer_input", None) or 0,
    }


def _sections(config: Any) -> dict[str, Any]:
    """Return how many frequencies rotate by time, height and width, which are one position in a text."""
    sections = config.rope_parameters.get("mrope_section") or [11, 11, 10]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    if sum(sections) > frequencies:  # as in the class's default for smaller heads
        sections = [(frequencies + rest) // 3 for rest in (2, 1, 0)]
    return {"rope.dimension_sections": [*sections, 0][:4]}


def _recurrent(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    return _sections(config) | {
        "attention.recurrent_layers": [kind == "linear_attention" for kind in kinds],
        "full_attention_interval": full[0] if full else len(kinds) + 1,
    }


def _mla(config: Any) -> dict[str, Any]:
    """Return the sizes of latent attention, which llama.cpp computes with one key head."""
    rank, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + rotated,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rotated,
        "expert_shared_count": getattr(config, "n_shared_experts", None) or 0,
    }
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if getattr(config, "n_routed_experts", None) is None:
        keys["leading_dense_block_count"] = config.num_hidden_layers
        keys["expert_feed_forward_length"] = config.intermediate_size
    return keys


def _temperature(config: Any) -> dict[str, Any]:
    """Return by how much queries grow with their position beyond the original context."""
    rope = config.rope_parameters
    if not (scale := rope.get("llama_4_scaling_beta")):
        return {}
    length = rope["original_max_position_embeddings"]
    return {"attention.temperature_scale": float(scale), "attention.temperature_length": length}


def _mimo2(config: Any) -> dict[str, Any]:
    """Return what only MiMo 2 has: layers with a window have twice the key heads."""
    heads = config.num_key_value_heads
    return {
        "attention.head_count_kv": [
            2 * heads if kind == "sliding_attention" else heads for kind in config.layer_types
        ],
        "attention.value_length": config.v_head_dim,
        "attention.value_scale": float(config.attention_value_scale or 1.0),
    }


def _minicpm3(config: Any) -> dict[str, Any]:
    """Return the sizes of MiniCPM 3's latent attention, which llama.cpp computes with all its heads."""
    return {
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def _gating(name: str) -> Callable[[Any], dict[str, Any]]:
    number = {"softmax": 1, "sigmoid": 2}[name]
    return lambda config: {"expert_gating_func": number}


def _has(kind: str) -> Callable[[Any], bool]:
    return lambda config: kind in (getattr(config, "layer_types", None) or ())


_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})

_ROUTING = frozenset({"expert_weights_scale", "expert_weights_norm"})

_GROUPS = frozenset({"expert_group_count", "expert_group_used_count"})

_EXAONE_32B = 64
"""Number of layers by which llama.cpp recognizes the one with windows, whose other layers do not rotate."""

_EXPERTS_EVERYWHERE = {"mlp_only_layers": [], "decoder_sparse_step": 1}


def _granite_hybrid(config: Any) -> dict[str, Any]:
    return {"rope.scaling.finetuned": getattr(config, "position_embedding_type", "rope") == "rope"}


def _no_dense_layers(config: Any) -> dict[str, Any]:
    if "mlp" in config.layer_types:
        raise cannot_compute("some of its layers have no experts")
    return {}


def _is_mixture(config: Any) -> bool:
    return bool(getattr(config, "num_local_experts", 0))


_MAMBA_SETTINGS = frozenset(
    {
        "attn_layer_indices",
        "mamba_expand",
        "mamba_chunk_size",
        "mamba_d_head",
        "mamba_d_ssm",
        "position_embedding_type",
    }
)

CONVENTIONS: tuple[Convention, ...] = (
    Convention(
        architecture="llama",
        types=("llama", "mistral", "ministral", "mixtral", "iquestcoder", "internlm3"),
        rewrites=PAIRS,
    ),
    Convention(architecture="llama", types=("helium",)),
    Convention(architecture="arcee", rewrites=PAIRS),
    Convention(
        architecture="smollm3",
        rewrites=PAIRS,
        folded=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        keys=_no_rope_every_fourth,
    ),
    Convention(
        architecture="mistral3",
        types=("ministral3",),
        rewrites=PAIRS,
        yarn_multiplier=1.0,
        keys=_temperature,
    ),
    Convention(
        architecture="mistral4",
        rewrites=MLA,
        reads=_ROUTING | _GROUPS,
        yarn_multiplier=0.1,
        dense_layers="first",
        keys=lambda config: _mla(config) | _temperature(config) | _gating("softmax")(config),
    ),
    Convention(
        architecture="granitehybrid",
        types=("granitemoehybrid",),
        when=lambda config: _has("linear_attention")(config) and _is_mixture(config),
        rewrites=(*SHARED, *PAIRS, *MAMBA2),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
        kv_by_layer=True,
        keys=_granite_hybrid,
    ),
    Convention(
        architecture="granitehybrid",
        types=("granitemoehybrid", "bamba"),
        when=lambda config: _has("linear_attention")(config) or config.model_type == "bamba",
        rewrites=(*ALONE, *PAIRS, *MAMBA2),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
        kv_by_layer=True,
        keys=_granite_hybrid,
    ),
    Convention(
        architecture="granitemoe",
        types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        when=_is_mixture,
        rewrites=(*SHARED, *PAIRS),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
    ),
    Convention(
        architecture="granite",
        types=("granite", "granitemoehybrid", "granite4_vision", "granite_docling"),
        rewrites=(*ALONE, *PAIRS),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
    ),
    Convention(architecture="qwen2"),
    Convention(architecture="qwen3"),
    Convention(architecture="qwen2moe", fixed=_EXPERTS_EVERYWHERE),
    Convention(architecture="qwen3moe", fixed=_EXPERTS_EVERYWHERE | {"norm_topk_prob": True}),
    Convention(architecture="qwen3next", rewrites=QWEN3_NEXT, fixed=_EXPERTS_EVERYWHERE, keys=_recurrent),
    Convention(architecture="qwen35", rewrites=QWEN35, keys=_recurrent),
    Convention(architecture="qwen35moe", rewrites=QWEN35, keys=_recurrent),
    Convention(architecture="gemma", rewrites=GEMMA),
    Convention(
        architecture="gemma2",
        rewrites=GEMMA,
        reads=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
        folded=frozenset({"query_pre_attn_scalar"}),
        windows=True,
        keys=_gemma_scale("gemma2"),
    ),
    Convention(
        architecture="gemma3",
        rewrites=GEMMA,
        reads=frozenset({"final_logit_softcapping"}),
        folded=frozenset({"query_pre_attn_scalar"}),
        windows=True,
        keys=_gemma_scale("gemma3"),
    ),
    Convention(
        architecture="gemma3n",
        rewrites=GEMMA3N,
        reads=frozenset({"attention.shared_kv_layers"}),
        folded=frozenset({"altup_coef_clip"}),
        fixed=_GEMMA_3N,
        windows=True,
        keys=_gemma3n,
        unused=_keys_of_shared_layers,
    ),
    Convention(
        architecture="gemma4",
        types=("gemma4", "gemma4_unified"),
        rewrites=GEMMA4,
        reads=frozenset({"final_logit_softcapping", "attention.shared_kv_layers"}),
        folded=frozenset(
            {
                "use_double_wide_mlp",
                "per_layer_config",
                "enable_moe_block",
                "attention_k_eq_v",
                "use_bidirectional_attention",
            }
        ),
        windows=True,
        keys=_gemma4,
    ),
    Convention(architecture="phi3", keys=lambda config: {"attention.sliding_window": 0}),
    Convention(architecture="olmo2", types=("olmo2", "olmo3"), windows=True),
    Convention(
        architecture="olmo",
        rewrites=PAIRS,
        reads=frozenset({"attention.clamp_kqv"}),
        keys=lambda config: {"attention.layer_norm_epsilon": 1e-5},
    ),
    Convention(architecture="olmoe"),
    Convention(architecture="chatglm", types=("glm",)),
    Convention(architecture="glm4", types=("glm4", "glm4v", "glm_ocr")),
    Convention(
        architecture="glm4moe",
        types=("glm4_moe", "glm4v_moe", "solar_open"),
        reads=_ROUTING | _GROUPS,
        folded=frozenset({"use_qk_norm"}),
        dense_layers="first",
        keys=_gating("sigmoid"),
    ),
    Convention(
        architecture="deepseek2",
        types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"),
        rewrites=MLA,
        reads=_ROUTING | _GROUPS,
        folded=frozenset({"topk_method"}),
        yarn_multiplier=0.1,
        dense_layers="first",
        keys=lambda config: (
            _mla(config) | _gating("softmax" if config.model_type == "deepseek_v2" else "sigmoid")(config)
        ),
    ),
    Convention(architecture="seed_oss"),
    Convention(
        architecture="apertus",
        types=("apertus", "apertus1p5"),
        scalars={f".mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    Convention(architecture="ernie4_5"),
    Convention(
        architecture="ernie4_5-moe",
        dense_layers="first",
        keys=lambda config: {"interleave_moe_layer_step": config.moe_layer_interval},
    ),
    Convention(architecture="gpt-oss", rewrites=GPT_OSS, windows=True),
    Convention(
        architecture="lfm2",
        folded=frozenset(
            {"block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "conv_L_cache"}
        ),
        kv_by_layer=True,
    ),
    Convention(
        architecture="lfm2moe",
        folded=frozenset({"use_expert_bias", "conv_L_cache"}),
        fixed={"norm_topk_prob": True},
        kv_by_layer=True,
        dense_layers="first",
        keys=_gating("sigmoid"),
    ),
    Convention(
        architecture="falcon-h1",
        rewrites=FALCON_H1,
        folded=_MAMBA_SETTINGS
        | {
            "lm_head_multiplier",
            "embedding_multiplier",
            "mlp_multipliers",
            "key_multiplier",
            "attention_out_multiplier",
            "attention_in_multiplier",
            "ssm_multipliers",
            "ssm_in_multiplier",
            "ssm_out_multiplier",
            "num_logits_to_keep",
        },
    ),
    Convention(
        architecture="nemotron_h_moe",
        types=("nemotron_h",),
        when=_has("moe"),
        rewrites=MAMBA2,
        reads=_ROUTING,
        folded=frozenset({"expand", "chunk_size", "mtp_layers_block_type"}),
        kv_by_layer=True,
        dense_layers="any",
        keys=_no_dense_layers,
    ),
    Convention(
        architecture="nemotron_h",
        rewrites=MAMBA2,
        folded=frozenset({"expand", "chunk_size", "mtp_layers_block_type", "norm_topk_prob"}),
        kv_by_layer=True,
    ),
    Convention(architecture="command-r", types=("cohere",), reads=frozenset({"logit_scale"})),
    Convention(architecture="cohere2", reads=frozenset({"logit_scale"}), windows=True),
    Convention(architecture="starcoder2"),
    Convention(architecture="stablelm", folded=frozenset({"use_parallel_residual"})),
    Convention(architecture="nemotron", rewrites=GEMMA),
    Convention(architecture="phi2", types=("phi",)),
    Convention(
        architecture="gptneox",
        types=("gpt_neox",),
        rewrites=NEOX,
        reads=frozenset({"use_parallel_residual"}),
    ),
    Convention(architecture="hunyuan-dense", types=("hunyuan_v1_dense",)),
    Convention(architecture="qwen2vl", types=("qwen2_vl", "qwen2_5_vl"), keys=_sections),
    Convention(architecture="qwen3vl", keys=_sections),
    Convention(
        architecture="qwen3vlmoe",
        types=("qwen3_vl_moe", "qwen3_omni_moe"),
        rewrites=INPUTS_FIRST,
        fixed=_EXPERTS_EVERYWHERE | {"norm_topk_prob": True},
        keys=_sections,
    ),
    Convention(
        architecture="afmoe",
        reads=frozenset({"expert_weights_scale"}),
        fixed={"mup_enabled": True},
        windows=True,
        dense_layers="first",
        keys=lambda config: _gating("sigmoid")(config) | {"expert_weights_norm": True},
    ),
    Convention(
        architecture="exaone4",
        types=("exaone4", "exaone4_5"),
        when=lambda config: config.num_hidden_layers == _EXAONE_32B,
        windows=True,
    ),
    Convention(architecture="exaone4", types=("exaone4", "exaone4_5"), fixed={"sliding_window": None}),
    Convention(architecture="exaone"),
    Convention(
        architecture="exaone-moe",
        reads=_ROUTING | _GROUPS,
        windows=True,
        dense_layers="first",
        keys=_gating("sigmoid"),
    ),
    Convention(
        architecture="mimo2",
        types=("mimo_v2_flash",),
        rewrites=SINKS,
        reads=_GROUPS,
        folded=frozenset({"attention_value_scale"}),
        fixed={"norm_topk_prob": True, "routed_scaling_factor": 1.0},
        windows=True,
        dense_layers="first",
        keys=lambda config: _mimo2(config) | _gating("sigmoid")(config),
    ),
    Convention(architecture="jais2"),
    Convention(architecture="bloom", rewrites=NEOX),
    Convention(architecture="minicpm3", keys=_minicpm3),
    Convention(architecture="gpt2", rewrites=GPT2),
    Convention(
        architecture="falcon",
        rewrites=FALCON,
        folded=frozenset({"multi_query"}),
        keys=lambda config: {"attention.head_count_kv": falcon_key_heads(config)},
    ),
    Convention(architecture="starcoder", types=("gpt_bigcode",)),
    Convention(
        architecture="mamba",
        folded=frozenset({"expand"}),
        keys=lambda config: {"ssm.time_step_rank": config.time_step_rank},
    ),
    Convention(
        architecture="mamba2",
        rewrites=MAMBA2,
        folded=frozenset({"expand", "chunk_size"}),
    ),
    Convention(
        architecture="llama4",
        rewrites=TRANSPOSED_EXPERTS,
        fixed={"attention_chunk_size": 8192},
        dense_layers="any",
        folded=frozenset(
            {"no_rope_layers", "no_rope_layer_interval", "moe_layers", "interleave_moe_layer_step"}
        ),
        keys=lambda config: (
            _no_rope_every_fourth(config) | {"interleave_moe_layer_step": config.interleave_moe_layer_step}
        ),
    ),
    Convention(architecture="hunyuan-moe", types=("hunyuan_v1_moe",)),
    Convention(architecture="minimax-m2", keys=_gating("sigmoid")),
    Convention(architecture="dots1", reads=_ROUTING, dense_layers="first", keys=_gating("sigmoid")),
)


COMPUTED_OTHERWISE = {
    "phimoe": "it weighs experts by a sparse mixer, but llama.cpp weighs them by a softmax",
}
"""Model types that llama.cpp has an architecture for, which computes something else."""


def convention_of(config: Any) -> Convention:
    """Return how llama.cpp stores a model, from its text config. Raises UserError if it is not supported."""
    model_type = config.model_type.removesuffix("_text")
    if (why := COMPUTED_OTHERWISE.get(model_type)) is not None:
        raise cannot_compute(why)
    for convention in CONVENTIONS:
        named = model_type in convention.types or (
            not convention.types and _plain(model_type) == _plain(convention.architecture)
        )
        if named and convention.when(config):
            return convention
    raise _unsupported(model_type)


def _unsupported(model_type: str) -> UserError:
    import gguf

    known = next(
        (name for name in gguf.MODEL_ARCH_NAMES.values() if _plain(name) == _plain(model_type)), None
    )
    return UserError(
        "This model cannot be exported as GGUF",
        what=f"It is a {model_type}, which llama.cpp may compute as {known}; this version cannot write it."
        if known
        else f"It is a {model_type}; no architecture of llama.cpp is known for it here.",
        fix="Export it with `qlora-tui export merge`: transformers and vLLM load that folder, and "
        "llama.cpp's convert_hf_to_gguf.py converts it if llama.cpp has the architecture.",
    )


def _plain(name: str) -> str:
    return re.sub(r"[_\-]", "", name)
