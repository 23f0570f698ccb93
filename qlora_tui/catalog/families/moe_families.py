"""Mixtures of experts. transformers fuses the routed experts of a layer into 3-D parameters."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.families.llama_like import (
    HEAD_NORMS,
    TWO_NORMS,
    WIDE_NORMS,
    attention,
    gated_mlp,
    head_dim,
    kv_heads,
)
from qlora_tui.catalog.family_spec import (
    ConfigFields,
    Family,
    LayerEntry,
    LinearSpec,
    NormSpec,
    ParameterSpec,
    SizeField,
    Sizes,
)

EXPERT_COUNT = ("num_local_experts", "num_experts", "n_routed_experts")
PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "top_k_experts")


def expert_sizes(inner: str = "moe_intermediate_size") -> dict[str, SizeField]:
    return {
        "experts": SizeField(EXPERT_COUNT),
        "per_token": SizeField(PER_TOKEN),
        "expert_inner": SizeField((inner,)),
    }


def routed(at: str = "mlp", router: str = "gate", condition: str = "") -> tuple[LayerEntry, ...]:
    """Return a router (a plain parameter, not a Linear) and its experts."""
    return (
        ParameterSpec(f"{at}.{router}.weight", ("experts", "hidden"), "router", condition),
        ParameterSpec(
            f"{at}.experts.gate_up_proj", ("experts", "2*expert_inner", "hidden"), "expert", condition
        ),
        ParameterSpec(f"{at}.experts.down_proj", ("experts", "hidden", "expert_inner"), "expert", condition),
    )


def shared_expert(name: str, condition: str = "", bias: bool | str = False) -> tuple[LayerEntry, ...]:
    """Return the expert for all tokens."""
    return (
        LinearSpec(f"mlp.{name}.gate_proj", "hidden", "shared_inner", "shared_expert", bias, condition),
        LinearSpec(f"mlp.{name}.up_proj", "hidden", "shared_inner", "shared_expert", bias, condition),
        LinearSpec(f"mlp.{name}.down_proj", "shared_inner", "hidden", "shared_expert", bias, condition),
    )


QWEN_SHARED_EXPERT = (
    *shared_expert("shared_expert", "sparse"),
    LinearSpec("mlp.shared_expert_gate", "hidden", "1", "shared_expert", condition="sparse"),
)


def sparse_every(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    """Apply Qwen's rule: each ``decoder_sparse_step``-th layer is sparse, except ``mlp_only_layers``."""
    step = fields.size(("decoder_sparse_step",)) or 1
    dense = fields.indices("mlp_only_layers")
    sparse = [(i + 1) % step == 0 and i not in dense for i in range(sizes["layers"])]
    return [{"sparse": int(is_sparse), "dense": int(not is_sparse)} for is_sparse in sparse]


def sparse_after_first(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    """Apply DeepSeek's rule: the first ``first_k_dense_replace`` layers are dense."""
    first = sizes["dense_layers"]
    return [{"sparse": int(i >= first), "dense": int(i < first)} for i in range(sizes["layers"])]


MIXTRAL = Family(
    model_types=("mixtral",),
    layer=(*attention(False), *routed(), *TWO_NORMS),
    sizes={
        **kv_heads(8),
        "experts": SizeField(EXPERT_COUNT, default=8),
        "per_token": SizeField(PER_TOKEN, default=2),
        "expert_inner": SizeField(("intermediate_size",)),
    },
)
OLMOE = Family(
    model_types=("olmoe",),
    layer=(*attention(), *WIDE_NORMS, *routed(), *TWO_NORMS),
    flags={"attention_bias": False},
    sizes=expert_sizes("intermediate_size"),
)
GRANITE_MOE = Family(
    model_types=("granitemoe",),
    layer=(*attention(), *TWO_NORMS, *routed("block_sparse_moe", "router")),
    flags={"attention_bias": False},
    sizes=expert_sizes("intermediate_size"),
)
QWEN2_MOE = Family(
    model_types=("qwen2_moe",),
    layer=(
        *attention("qkv_bias", out_bias=False),
        *routed(condition="sparse"),
        *QWEN_SHARED_EXPERT,
        *gated_mlp(condition="dense"),
        *TWO_NORMS,
    ),
    flags={"qkv_bias": True},
    sizes={
        **kv_heads(16),
        **expert_sizes(),
        "shared_inner": SizeField(("shared_expert_intermediate_size",)),
    },
    per_layer=sparse_every,
)
QWEN3_MOE = Family(
    model_types=("qwen3_moe",),
    layer=(
        *attention(),
        *HEAD_NORMS,
        *routed(condition="sparse"),
        *gated_mlp(condition="dense"),
        *TWO_NORMS,
    ),
    flags={"attention_bias": False},
    sizes={**kv_heads(4), **expert_sizes()},
    per_layer=sparse_every,
)

GPT_OSS = Family(
    model_types=("gpt_oss",),
    layer=(
        ParameterSpec("self_attn.sinks", ("heads",), "other"),
        *attention(),
        ParameterSpec("mlp.router.weight", ("experts", "hidden"), "router"),
        ParameterSpec("mlp.router.bias", ("experts",), "router"),
        ParameterSpec("mlp.experts.gate_up_proj", ("experts", "hidden", "2*expert_inner"), "expert"),
        ParameterSpec("mlp.experts.gate_up_proj_bias", ("experts", "2*expert_inner"), "expert"),
        ParameterSpec("mlp.experts.down_proj", ("experts", "expert_inner", "hidden"), "expert"),
        ParameterSpec("mlp.experts.down_proj_bias", ("experts", "hidden"), "expert"),
        *TWO_NORMS,
    ),
    flags={"attention_bias": True},
    sizes={
        **kv_heads(8),
        **head_dim(64),
        **expert_sizes("intermediate_size"),
        "per_token": SizeField(PER_TOKEN, default=4),
    },
)


def _latent_attention(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Set the sizes of multi-head latent attention: two-part queries and keys, values of another width."""
    sizes["head_dim"] = sizes["qk_nope"] + sizes["qk_rope"]
    sizes["latent_q"] = int(sizes["q_rank"] > 0)
    sizes["direct_q"] = int(sizes["q_rank"] == 0)
    sizes["shared_inner"] = sizes["shared_experts"] * sizes["expert_inner"]


DEEPSEEK_V2 = Family(
    model_types=("deepseek_v2",),
    layer=(
        LinearSpec("self_attn.q_proj", "hidden", "heads*head_dim", "attention", condition="direct_q"),
        LinearSpec("self_attn.q_a_proj", "hidden", "q_rank", "attention", "attention_bias", "latent_q"),
        NormSpec("self_attn.q_a_layernorm", "q_rank", condition="latent_q"),
        LinearSpec("self_attn.q_b_proj", "q_rank", "heads*head_dim", "attention", condition="latent_q"),
        LinearSpec(
            "self_attn.kv_a_proj_with_mqa", "hidden", "kv_rank+qk_rope", "attention", "attention_bias"
        ),
        NormSpec("self_attn.kv_a_layernorm", "kv_rank"),
        LinearSpec("self_attn.kv_b_proj", "kv_rank", "heads*qk_nope+heads*v_head", "attention"),
        LinearSpec("self_attn.o_proj", "heads*v_head", "hidden", "attention", "attention_bias"),
        *gated_mlp("mlp_bias", condition="dense"),
        *routed(condition="sparse"),
        *shared_expert("shared_experts", "sparse", "mlp_bias"),
        *TWO_NORMS,
    ),
    flags={"attention_bias": False, "mlp_bias": False},
    sizes={
        **expert_sizes(),
        "shared_experts": SizeField(("n_shared_experts",), default=2),
        "dense_layers": SizeField(("first_k_dense_replace",), default=0, minimum=0),
        "q_rank": SizeField(("q_lora_rank",), default=1536, null_value=0),
        "kv_rank": SizeField(("kv_lora_rank",), default=512),
        "qk_nope": SizeField(("qk_nope_head_dim",), default=128),
        "qk_rope": SizeField(("qk_rope_head_dim",), default=64),
        "v_head": SizeField(("v_head_dim",), default=128),
    },
    adjust=_latent_attention,
    per_layer=sparse_after_first,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    model_types=("deepseek_v3",),
    flags={"attention_bias": False},
    layer=tuple(
        replace(entry, bias=False) if isinstance(entry, LinearSpec) and entry.bias == "mlp_bias" else entry
        for entry in DEEPSEEK_V2.layer
    ),
    sizes={
        **DEEPSEEK_V2.sizes,
        "shared_experts": SizeField(("n_shared_experts",), default=1),
        "dense_layers": SizeField(("first_k_dense_replace",), default=3, minimum=0),
    },
)

FAMILIES = (MIXTRAL, OLMOE, GRANITE_MOE, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
