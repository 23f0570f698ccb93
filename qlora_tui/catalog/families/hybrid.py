"""Decoders whose layers differ: LFM2's convolutions, Qwen3.5's linear attention, Gemma 4's wide layers."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.families.llama_like import (
    FOUR_NORMS,
    HEAD_NORMS,
    TWO_NORMS,
    gated_mlp,
    head_dim,
    kv_heads,
)
from qlora_tui.catalog.families.moe_families import QWEN_SHARED_EXPERT, expert_sizes, routed, sparse_every
from qlora_tui.catalog.family_spec import (
    ConfigFields,
    Family,
    LayerEntry,
    LinearSpec,
    NormSpec,
    NotInTableError,
    ParameterSpec,
    SizeField,
    Sizes,
)


def _lfm2_sizes(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Set the MLP width; the one in the file is before the two-thirds rule (``Lfm2MLP`` in transformers)."""
    if not sizes["block_auto_adjust_ff_dim"]:
        return
    inner = 2 * sizes["inner"] // 3
    inner = int((fields.number("block_ffn_dim_multiplier") or 1.0) * inner)
    sizes["inner"] = -(-inner // sizes["multiple"]) * sizes["multiple"]


def _lfm2_layers(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    layers = sizes["layers"]
    kinds = fields.names("layer_types", layers)
    if kinds is None:
        attentive = fields.indices("full_attn_idxs") or frozenset(range(layers))
        kinds = tuple("full_attention" if i in attentive else "conv" for i in range(layers))
    return [{"full": int(kind == "full_attention"), "conv": int(kind != "full_attention")} for kind in kinds]


LFM2 = Family(
    model_types=("lfm2",),
    layer=(
        ParameterSpec("conv.conv.weight", ("hidden", "1", "kernel"), "conv", "conv"),
        ParameterSpec("conv.conv.bias", ("hidden",), "conv", "biased_conv"),
        LinearSpec("conv.in_proj", "hidden", "3*hidden", "mixer", "conv_bias", "conv"),
        LinearSpec("conv.out_proj", "hidden", "hidden", "mixer", "conv_bias", "conv"),
        LinearSpec("self_attn.q_proj", "hidden", "q", "attention", condition="full"),
        LinearSpec("self_attn.k_proj", "hidden", "kv", "attention", condition="full"),
        LinearSpec("self_attn.v_proj", "hidden", "kv", "attention", condition="full"),
        LinearSpec("self_attn.out_proj", "q", "hidden", "attention", condition="full"),
        NormSpec("self_attn.q_layernorm", "head_dim", condition="full"),
        NormSpec("self_attn.k_layernorm", "head_dim", condition="full"),
        LinearSpec("feed_forward.w1", "hidden", "inner", "mlp"),
        LinearSpec("feed_forward.w3", "hidden", "inner", "mlp"),
        LinearSpec("feed_forward.w2", "inner", "hidden", "mlp"),
        NormSpec("operator_norm"),
        NormSpec("ffn_norm"),
    ),
    top_level=(NormSpec("embedding_norm"),),
    flags={"block_auto_adjust_ff_dim": True, "conv_bias": False},
    sizes={
        **kv_heads(8),
        "inner": SizeField(("block_ff_dim", "intermediate_size")),
        "kernel": SizeField(("conv_L_cache",), default=3),
        "multiple": SizeField(("block_multiple_of",), default=256),
    },
    adjust=_lfm2_sizes,
    per_layer=lambda fields, sizes: [
        {**layer, "biased_conv": layer["conv"] * sizes["conv_bias"]} for layer in _lfm2_layers(fields, sizes)
    ],
    tied=True,
)


def _linear_attention_layers(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    """Return three layers of linear attention, then one of full attention, unless the file lists them."""
    layers = sizes["layers"]
    kinds = fields.names("layer_types", layers)
    if kinds is None:
        interval = fields.size(("full_attention_interval",)) or 4
        kinds = tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers))
    return [
        {"full": int(kind == "full_attention"), "linear": int(kind != "full_attention")} for kind in kinds
    ]


def _linear_attention_sizes(fields: ConfigFields, sizes: dict[str, int]) -> None:
    sizes["keys"] = sizes["linear_key_dim"] * sizes["linear_key_heads"]
    sizes["values"] = sizes["linear_value_dim"] * sizes["linear_value_heads"]


GATED_ATTENTION: tuple[LayerEntry, ...] = (
    LinearSpec("self_attn.q_proj", "hidden", "2*q", "attention", "attention_bias", "full"),
    LinearSpec("self_attn.k_proj", "hidden", "kv", "attention", "attention_bias", "full"),
    LinearSpec("self_attn.v_proj", "hidden", "kv", "attention", "attention_bias", "full"),
    LinearSpec("self_attn.o_proj", "q", "hidden", "attention", "attention_bias", "full"),
    NormSpec("self_attn.q_norm", "head_dim", condition="full"),
    NormSpec("self_attn.k_norm", "head_dim", condition="full"),
)
"""Attention whose query projection includes a gate of the same width."""
DELTA_NET: tuple[LayerEntry, ...] = (
    ParameterSpec("linear_attn.dt_bias", ("linear_value_heads",), "other", "linear"),
    ParameterSpec("linear_attn.A_log", ("linear_value_heads",), "other", "linear"),
    ParameterSpec("linear_attn.conv1d.weight", ("2*keys+values", "1", "kernel"), "conv", "linear"),
    NormSpec("linear_attn.norm", "linear_value_dim", condition="linear"),
    LinearSpec("linear_attn.out_proj", "values", "hidden", "mixer", condition="linear"),
)
DELTA_NET_SIZES = {
    "linear_key_dim": SizeField(("linear_key_head_dim",), default=128),
    "linear_value_dim": SizeField(("linear_value_head_dim",), default=128),
    "linear_key_heads": SizeField(("linear_num_key_heads",), default=16),
    "linear_value_heads": SizeField(("linear_num_value_heads",), default=32),
    "kernel": SizeField(("linear_conv_kernel_dim",), default=4),
}
SPLIT_INPUT: tuple[LayerEntry, ...] = (
    LinearSpec("linear_attn.in_proj_qkv", "hidden", "2*keys+values", "mixer", condition="linear"),
    LinearSpec("linear_attn.in_proj_z", "hidden", "values", "mixer", condition="linear"),
    LinearSpec("linear_attn.in_proj_b", "hidden", "linear_value_heads", "mixer", condition="linear"),
    LinearSpec("linear_attn.in_proj_a", "hidden", "linear_value_heads", "mixer", condition="linear"),
)
FUSED_INPUT: tuple[LayerEntry, ...] = (
    LinearSpec("linear_attn.in_proj_qkvz", "hidden", "2*keys+2*values", "mixer", condition="linear"),
    LinearSpec("linear_attn.in_proj_ba", "hidden", "2*linear_value_heads", "mixer", condition="linear"),
)

QWEN3_5 = Family(
    model_types=("qwen3_5_text",),
    layer=(*DELTA_NET, *SPLIT_INPUT, *GATED_ATTENTION, *gated_mlp(), *TWO_NORMS),
    flags={"attention_bias": False},
    sizes={**kv_heads(4), **head_dim(256), **DELTA_NET_SIZES},
    adjust=_linear_attention_sizes,
    per_layer=_linear_attention_layers,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    model_types=("qwen3_5_moe_text",),
    layer=(
        *DELTA_NET,
        *SPLIT_INPUT,
        *GATED_ATTENTION,
        *routed(condition="sparse"),
        *QWEN_SHARED_EXPERT,
        *TWO_NORMS,
    ),
    sizes={
        **kv_heads(2),
        **head_dim(256),
        **DELTA_NET_SIZES,
        **expert_sizes(),
        "shared_inner": SizeField(("shared_expert_intermediate_size",)),
    },
    per_layer=lambda fields, sizes: [
        {**layer, "sparse": 1} for layer in _linear_attention_layers(fields, sizes)
    ],
)
QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    model_types=("qwen3_next",),
    layer=(
        *DELTA_NET,
        *FUSED_INPUT,
        *GATED_ATTENTION,
        *routed(condition="sparse"),
        *QWEN_SHARED_EXPERT,
        *gated_mlp(condition="dense"),
        *TWO_NORMS,
    ),
    per_layer=lambda fields, sizes: [
        {**attention, **mlp}
        for attention, mlp in zip(
            _linear_attention_layers(fields, sizes), sparse_every(fields, sizes), strict=True
        )
    ],
)


def _gemma4_sizes(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Raise NotInTableError for the small Gemma 4, with embeddings for each layer and shared keys."""
    defaults = {"hidden_size_per_layer_input": 256, "num_kv_shared_layers": 0}
    for key, absent in defaults.items():
        if fields.values.get(key, absent):
            raise NotInTableError
    if fields.flag("use_double_wide_mlp", False):
        raise NotInTableError


def _gemma4_layers(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    """Return the sizes by layer: full attention has wider heads, fewer keys, and may use keys as values."""
    layers = sizes["layers"]
    kinds = fields.names("layer_types", layers)
    if kinds is None:
        kinds = tuple("full_attention" if (i + 1) % 6 == 0 else "" for i in range(layers))
    same = sizes["attention_k_eq_v"]
    wide = {
        "head_dim": sizes["global_head_dim"],
        "q": sizes["heads"] * sizes["global_head_dim"],
        "kv": (sizes["global_kv_heads"] if same else sizes["kv_heads"]) * sizes["global_head_dim"],
        "values": 1 - same,
    }
    last = layers - 1
    return [wide if kind == "full_attention" or i == last else {"values": 1} for i, kind in enumerate(kinds)]


GEMMA4 = Family(
    model_types=("gemma4_text",),
    layer=(
        LinearSpec("self_attn.q_proj", "hidden", "q", "attention", "attention_bias"),
        LinearSpec("self_attn.k_proj", "hidden", "kv", "attention", "attention_bias"),
        LinearSpec("self_attn.v_proj", "hidden", "kv", "attention", "attention_bias", "values"),
        LinearSpec("self_attn.o_proj", "q", "hidden", "attention", "attention_bias"),
        *HEAD_NORMS,
        *gated_mlp(),
        *FOUR_NORMS,
        ParameterSpec("router.scale", ("hidden",), "router", "enable_moe_block"),
        ParameterSpec("router.per_expert_scale", ("experts",), "router", "enable_moe_block"),
        LinearSpec("router.proj", "hidden", "experts", "router", condition="enable_moe_block"),
        ParameterSpec(
            "experts.gate_up_proj", ("experts", "2*expert_inner", "hidden"), "expert", "enable_moe_block"
        ),
        ParameterSpec(
            "experts.down_proj", ("experts", "hidden", "expert_inner"), "expert", "enable_moe_block"
        ),
        NormSpec("post_feedforward_layernorm_1", condition="enable_moe_block"),
        NormSpec("post_feedforward_layernorm_2", condition="enable_moe_block"),
        NormSpec("pre_feedforward_layernorm_2", condition="enable_moe_block"),
    ),
    flags={"attention_bias": False, "enable_moe_block": False, "attention_k_eq_v": False},
    sizes={
        **kv_heads(4),
        **head_dim(256),
        "global_head_dim": SizeField(("global_head_dim",), default=512),
        "global_kv_heads": SizeField(("num_global_key_value_heads",), default="kv_heads"),
        "experts": SizeField(("num_experts",), default=0),
        "per_token": SizeField(("top_k_experts",), default=0),
        "expert_inner": SizeField(("moe_intermediate_size",), default=0),
    },
    adjust=_gemma4_sizes,
    per_layer=_gemma4_layers,
    tied=True,
    activation="gelu_pytorch_tanh",
)

FAMILIES = (LFM2, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT, GEMMA4)
