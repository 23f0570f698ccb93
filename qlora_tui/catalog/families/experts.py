"""Mixtures of experts. transformers fuses the routed experts of a layer into 3-D parameters."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.config_fields import ConfigFields
from qlora_tui.catalog.families.llama_like import (
    HEAD_NORMS,
    TWO_NORMS,
    WIDE_NORMS,
    attention,
    gated_mlp,
    head_dim,
    kv_heads,
)
from qlora_tui.catalog.template import Entry, Family, Linear, Norm, Size, Sizes, Tensor

EXPERT_COUNT = ("num_local_experts", "num_experts", "n_routed_experts")
PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "top_k_experts")


def expert_sizes(inner: str = "moe_intermediate_size") -> dict[str, Size]:
    return {
        "experts": Size(EXPERT_COUNT),
        "per_token": Size(PER_TOKEN),
        "expert_inner": Size((inner,)),
    }


def routed(at: str = "mlp", router: str = "gate", only: str = "") -> tuple[Entry, ...]:
    """A router (a plain parameter, not a Linear) and the experts it chooses from."""
    return (
        Tensor(f"{at}.{router}.weight", ("experts", "hidden"), "router", only),
        Tensor(f"{at}.experts.gate_up_proj", ("experts", "2*expert_inner", "hidden"), "expert", only),
        Tensor(f"{at}.experts.down_proj", ("experts", "hidden", "expert_inner"), "expert", only),
    )


def shared_expert(name: str, only: str = "", bias: bool | str = False) -> tuple[Entry, ...]:
    """The expert that every token passes."""
    return (
        Linear(f"mlp.{name}.gate_proj", "hidden", "shared_inner", "shared_expert", bias, only),
        Linear(f"mlp.{name}.up_proj", "hidden", "shared_inner", "shared_expert", bias, only),
        Linear(f"mlp.{name}.down_proj", "shared_inner", "hidden", "shared_expert", bias, only),
    )


QWEN_SHARED_EXPERT = (
    *shared_expert("shared_expert", "sparse"),
    Linear("mlp.shared_expert_gate", "hidden", "1", "shared_expert", only="sparse"),
)


def sparse_every(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    """Qwen's rule: each ``decoder_sparse_step``-th layer, but those of ``mlp_only_layers``."""
    step = fields.size(("decoder_sparse_step",)) or 1
    dense = fields.indices("mlp_only_layers")
    sparse = [(i + 1) % step == 0 and i not in dense for i in range(sizes["layers"])]
    return [{"sparse": int(is_sparse), "dense": int(not is_sparse)} for is_sparse in sparse]


def sparse_after_first(fields: ConfigFields, sizes: Sizes) -> list[Sizes]:
    """DeepSeek's rule: the first ``first_k_dense_replace`` layers are dense."""
    first = sizes["dense_layers"]
    return [{"sparse": int(i >= first), "dense": int(i < first)} for i in range(sizes["layers"])]


MIXTRAL = Family(
    model_types=("mixtral",),
    layer=(*attention(False), *routed(), *TWO_NORMS),
    sizes={
        **kv_heads(8),
        "experts": Size(EXPERT_COUNT, absent=8),
        "per_token": Size(PER_TOKEN, absent=2),
        "expert_inner": Size(("intermediate_size",)),
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
        *routed(only="sparse"),
        *QWEN_SHARED_EXPERT,
        *gated_mlp(only="dense"),
        *TWO_NORMS,
    ),
    flags={"qkv_bias": True},
    sizes={
        **kv_heads(16),
        **expert_sizes(),
        "shared_inner": Size(("shared_expert_intermediate_size",)),
    },
    per_layer=sparse_every,
)
QWEN3_MOE = Family(
    model_types=("qwen3_moe",),
    layer=(
        *attention(),
        *HEAD_NORMS,
        *routed(only="sparse"),
        *gated_mlp(only="dense"),
        *TWO_NORMS,
    ),
    flags={"attention_bias": False},
    sizes={**kv_heads(4), **expert_sizes()},
    per_layer=sparse_every,
)

GPT_OSS = Family(
    model_types=("gpt_oss",),
    layer=(
        Tensor("self_attn.sinks", ("heads",), "other"),
        *attention(),
        Tensor("mlp.router.weight", ("experts", "hidden"), "router"),
        Tensor("mlp.router.bias", ("experts",), "router"),
        Tensor("mlp.experts.gate_up_proj", ("experts", "hidden", "2*expert_inner"), "expert"),
        Tensor("mlp.experts.gate_up_proj_bias", ("experts", "2*expert_inner"), "expert"),
        Tensor("mlp.experts.down_proj", ("experts", "expert_inner", "hidden"), "expert"),
        Tensor("mlp.experts.down_proj_bias", ("experts", "hidden"), "expert"),
        *TWO_NORMS,
    ),
    flags={"attention_bias": True},
    sizes={
        **kv_heads(8),
        **head_dim(64),
        **expert_sizes("intermediate_size"),
        "per_token": Size(PER_TOKEN, absent=4),
    },
)


def _latent_attention(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Multi-head latent attention: queries and keys of two parts, values of their own width."""
    sizes["head_dim"] = sizes["qk_nope"] + sizes["qk_rope"]
    sizes["latent_q"] = int(sizes["q_rank"] > 0)
    sizes["direct_q"] = int(sizes["q_rank"] == 0)
    sizes["shared_inner"] = sizes["shared_experts"] * sizes["expert_inner"]


DEEPSEEK_V2 = Family(
    model_types=("deepseek_v2",),
    layer=(
        Linear("self_attn.q_proj", "hidden", "heads*head_dim", "attention", only="direct_q"),
        Linear("self_attn.q_a_proj", "hidden", "q_rank", "attention", "attention_bias", "latent_q"),
        Norm("self_attn.q_a_layernorm", "q_rank", only="latent_q"),
        Linear("self_attn.q_b_proj", "q_rank", "heads*head_dim", "attention", only="latent_q"),
        Linear("self_attn.kv_a_proj_with_mqa", "hidden", "kv_rank+qk_rope", "attention", "attention_bias"),
        Norm("self_attn.kv_a_layernorm", "kv_rank"),
        Linear("self_attn.kv_b_proj", "kv_rank", "heads*qk_nope+heads*v_head", "attention"),
        Linear("self_attn.o_proj", "heads*v_head", "hidden", "attention", "attention_bias"),
        *gated_mlp("mlp_bias", only="dense"),
        *routed(only="sparse"),
        *shared_expert("shared_experts", "sparse", "mlp_bias"),
        *TWO_NORMS,
    ),
    flags={"attention_bias": False, "mlp_bias": False},
    sizes={
        **expert_sizes(),
        "shared_experts": Size(("n_shared_experts",), absent=2),
        "dense_layers": Size(("first_k_dense_replace",), absent=0, least=0),
        "q_rank": Size(("q_lora_rank",), absent=1536, null=0),
        "kv_rank": Size(("kv_lora_rank",), absent=512),
        "qk_nope": Size(("qk_nope_head_dim",), absent=128),
        "qk_rope": Size(("qk_rope_head_dim",), absent=64),
        "v_head": Size(("v_head_dim",), absent=128),
    },
    adjust=_latent_attention,
    per_layer=sparse_after_first,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    model_types=("deepseek_v3",),
    flags={"attention_bias": False},
    layer=tuple(
        replace(entry, bias=False) if isinstance(entry, Linear) and entry.bias == "mlp_bias" else entry
        for entry in DEEPSEEK_V2.layer
    ),
    sizes={
        **DEEPSEEK_V2.sizes,
        "shared_experts": Size(("n_shared_experts",), absent=1),
        "dense_layers": Size(("first_k_dense_replace",), absent=3, least=0),
    },
)

FAMILIES = (MIXTRAL, OLMOE, GRANITE_MOE, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
