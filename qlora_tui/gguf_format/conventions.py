"""llama.cpp's architecture for each model type, and the conventions of each architecture.

Names of tensors come from the tables of the ``gguf`` package. This module declares what no table contains:
rules of ``rewrites``, constants, and settings that llama.cpp has no key for. The computation of each
architecture is in llama.cpp, src/models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_tui.errors import UserError
from qlora_tui.gguf_format.computed_keys import (
    GEMMA_3N,
    cannot_compute,
    gating,
    gemma3n,
    gemma4,
    gemma_scale,
    granite_hybrid,
    keys_of_shared_layers,
    mimo2,
    minicpm3,
    mla,
    no_dense_layers,
    no_rope_every_fourth,
    recurrent,
    sections,
    temperature,
)
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
    """The conventions of one of llama.cpp's architectures."""

    architecture: str
    """Value of ``general.architecture``."""
    types: tuple[str, ...] = ()
    """Model types of transformers that use the architecture. If empty, only the model type with the same
    name.
    """
    when: Callable[[Any], bool] = lambda config: True
    """Returns whether the architecture applies to a config of these model types."""
    rewrites: tuple[Rewrite, ...] = ()
    reads: frozenset[str] = frozenset()
    """Constants that the architecture reads in addition to those that every architecture reads."""
    folded: frozenset[str] = frozenset()
    """Settings of the config that ``rewrites`` or ``keys`` take into account."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings without a key, with the value that llama.cpp computes with. Needed if this value is not the
    default of the config's class, or if the setting would otherwise not be checked."""
    windows: bool = False
    """Whether the architecture computes sliding windows."""
    kv_by_layer: bool = False
    """Whether the architecture treats a layer with 0 key heads as a layer without attention."""
    dense_layers: Literal["", "first", "any"] = ""
    """Which layers of a mixture of experts may have no experts."""
    yarn_multiplier: float = 0.0
    """Factor of ``mscale_all_dim`` in ``yarn_log_multiplier``; 0 if the key is not read."""
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Returns constants that are computed from several settings. May raise UserError."""
    unused: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    """Returns shapes of tensors that llama.cpp loads but does not compute with, by name in the file."""
    scalars: Mapping[str, str] = field(default_factory=dict)
    """For tensors with a single number: the suffix of their names, and the key of the file that lists the
    numbers of all layers.
    """


def _has(kind: str) -> Callable[[Any], bool]:
    return lambda config: kind in (getattr(config, "layer_types", None) or ())


_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})

_ROUTING = frozenset({"expert_weights_scale", "expert_weights_norm"})

_GROUPS = frozenset({"expert_group_count", "expert_group_used_count"})

_EXAONE_32B = 64
"""Number of layers by which llama.cpp recognizes EXAONE 4 32B, which has sliding windows. Its layers without
a window have no rotary embedding.
"""

_EXPERTS_EVERYWHERE = {"mlp_only_layers": [], "decoder_sparse_step": 1}


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
        keys=no_rope_every_fourth,
    ),
    Convention(
        architecture="mistral3",
        types=("ministral3",),
        rewrites=PAIRS,
        yarn_multiplier=1.0,
        keys=temperature,
    ),
    Convention(
        architecture="mistral4",
        rewrites=MLA,
        reads=_ROUTING | _GROUPS,
        yarn_multiplier=0.1,
        dense_layers="first",
        keys=lambda config: mla(config) | temperature(config) | gating("softmax")(config),
    ),
    Convention(
        architecture="granitehybrid",
        types=("granitemoehybrid",),
        when=lambda config: _has("linear_attention")(config) and _is_mixture(config),
        rewrites=(*SHARED, *PAIRS, *MAMBA2),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
        kv_by_layer=True,
        keys=granite_hybrid,
    ),
    Convention(
        architecture="granitehybrid",
        types=("granitemoehybrid", "bamba"),
        when=lambda config: _has("linear_attention")(config) or config.model_type == "bamba",
        rewrites=(*ALONE, *PAIRS, *MAMBA2),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
        kv_by_layer=True,
        keys=granite_hybrid,
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
    Convention(architecture="qwen3next", rewrites=QWEN3_NEXT, fixed=_EXPERTS_EVERYWHERE, keys=recurrent),
    Convention(architecture="qwen35", rewrites=QWEN35, keys=recurrent),
    Convention(architecture="qwen35moe", rewrites=QWEN35, keys=recurrent),
    Convention(architecture="gemma", rewrites=GEMMA),
    Convention(
        architecture="gemma2",
        rewrites=GEMMA,
        reads=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
        folded=frozenset({"query_pre_attn_scalar"}),
        windows=True,
        keys=gemma_scale("gemma2"),
    ),
    Convention(
        architecture="gemma3",
        rewrites=GEMMA,
        reads=frozenset({"final_logit_softcapping"}),
        folded=frozenset({"query_pre_attn_scalar"}),
        windows=True,
        keys=gemma_scale("gemma3"),
    ),
    Convention(
        architecture="gemma3n",
        rewrites=GEMMA3N,
        reads=frozenset({"attention.shared_kv_layers"}),
        folded=frozenset({"altup_coef_clip"}),
        fixed=GEMMA_3N,
        windows=True,
        keys=gemma3n,
        unused=keys_of_shared_layers,
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
        keys=gemma4,
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
        keys=gating("sigmoid"),
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
            mla(config) | gating("softmax" if config.model_type == "deepseek_v2" else "sigmoid")(config)
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
        keys=gating("sigmoid"),
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
        keys=no_dense_layers,
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
    Convention(architecture="qwen2vl", types=("qwen2_vl", "qwen2_5_vl"), keys=sections),
    Convention(architecture="qwen3vl", keys=sections),
    Convention(
        architecture="qwen3vlmoe",
        types=("qwen3_vl_moe", "qwen3_omni_moe"),
        rewrites=INPUTS_FIRST,
        fixed=_EXPERTS_EVERYWHERE | {"norm_topk_prob": True},
        keys=sections,
    ),
    Convention(
        architecture="afmoe",
        reads=frozenset({"expert_weights_scale"}),
        fixed={"mup_enabled": True},
        windows=True,
        dense_layers="first",
        keys=lambda config: gating("sigmoid")(config) | {"expert_weights_norm": True},
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
        keys=gating("sigmoid"),
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
        keys=lambda config: mimo2(config) | gating("sigmoid")(config),
    ),
    Convention(architecture="jais2"),
    Convention(architecture="bloom", rewrites=NEOX),
    Convention(architecture="minicpm3", keys=minicpm3),
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
            no_rope_every_fourth(config) | {"interleave_moe_layer_step": config.interleave_moe_layer_step}
        ),
    ),
    Convention(architecture="hunyuan-moe", types=("hunyuan_v1_moe",)),
    Convention(architecture="minimax-m2", keys=gating("sigmoid")),
    Convention(architecture="dots1", reads=_ROUTING, dense_layers="first", keys=gating("sigmoid")),
)


COMPUTED_OTHERWISE = {
    "phimoe": "it weighs experts by a sparse mixer, but llama.cpp weighs them by a softmax",
}
"""Model types for which llama.cpp's architecture computes something else, with the difference."""


def convention_of(config: Any) -> Convention:
    """Return llama.cpp's conventions for a text config. Raises UserError if it is not supported."""
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
        what=f"The model's type, {model_type}, may be the architecture {known} of llama.cpp, but this "
        "version of qlora-tui cannot write that architecture."
        if known
        else f"The model's type is {model_type}, for which no architecture of llama.cpp is known.",
        fix="Export the model with `qlora-tui export merge`: transformers and vLLM load the exported "
        "folder, and llama.cpp's convert_hf_to_gguf.py converts it if llama.cpp supports the architecture.",
    )


def _plain(name: str) -> str:
    return re.sub(r"[_\-]", "", name)
