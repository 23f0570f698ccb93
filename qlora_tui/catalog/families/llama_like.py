"""Decoders with separate q, k, v, o projections and a gated MLP, and similar ones."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.family_spec import Family, LayerEntry, LinearSpec, NormSpec, ParameterSpec, SizeField


def attention(
    bias: bool | str = "attention_bias", out_bias: bool | str | None = None
) -> tuple[LayerEntry, ...]:
    """Return the four projections; ``out_bias`` is for an output projection that differs from the others."""
    return (
        LinearSpec("self_attn.q_proj", "hidden", "q", "attention", bias),
        LinearSpec("self_attn.k_proj", "hidden", "kv", "attention", bias),
        LinearSpec("self_attn.v_proj", "hidden", "kv", "attention", bias),
        LinearSpec("self_attn.o_proj", "q", "hidden", "attention", bias if out_bias is None else out_bias),
    )


def gated_mlp(bias: bool | str = False, condition: str = "") -> tuple[LayerEntry, ...]:
    return (
        LinearSpec("mlp.gate_proj", "hidden", "inner", "mlp", bias, condition),
        LinearSpec("mlp.up_proj", "hidden", "inner", "mlp", bias, condition),
        LinearSpec("mlp.down_proj", "inner", "hidden", "mlp", bias, condition),
    )


FUSED_GATED_MLP = (
    LinearSpec("mlp.gate_up_proj", "hidden", "2*inner", "mlp"),
    LinearSpec("mlp.down_proj", "inner", "hidden", "mlp"),
)
TWO_NORMS = (NormSpec("input_layernorm"), NormSpec("post_attention_layernorm"))
POST_NORMS = (NormSpec("post_attention_layernorm"), NormSpec("post_feedforward_layernorm"))
FOUR_NORMS = (*TWO_NORMS, NormSpec("pre_feedforward_layernorm"), NormSpec("post_feedforward_layernorm"))
HEAD_NORMS = (NormSpec("self_attn.q_norm", "head_dim"), NormSpec("self_attn.k_norm", "head_dim"))
WIDE_NORMS = (NormSpec("self_attn.q_norm", "q"), NormSpec("self_attn.k_norm", "kv"))
BIASED_TWO_NORMS = (NormSpec("input_layernorm", bias=True), NormSpec("post_attention_layernorm", bias=True))


def kv_heads(default: int) -> dict[str, SizeField]:
    """Return ``num_key_value_heads`` with a class default; null means one for each head."""
    return {"kv_heads": SizeField(("num_key_value_heads",), default=default, null_value="heads")}


def head_dim(default: int) -> dict[str, SizeField]:
    """Return ``head_dim`` with a class default; null means hidden size over heads."""
    return {"head_dim": SizeField(("head_dim",), default=default, null_value="hidden_per_head")}


ATTENTION_BIAS = {"attention_bias": False}
BIASES = {"attention_bias": False, "mlp_bias": False}

LLAMA = Family(
    model_types=("llama",),
    layer=(*attention(), *gated_mlp("mlp_bias"), *TWO_NORMS),
    flags=BIASES,
)
SMOLLM3 = replace(LLAMA, model_types=("smollm3",), tied=True, sizes=kv_heads(4))
GRANITE = replace(LLAMA, model_types=("granite",))
HELIUM = replace(
    LLAMA,
    model_types=("helium",),
    layer=(
        *attention()[:3],
        LinearSpec("self_attn.o_proj", "hidden", "hidden", "attention"),
        *gated_mlp("mlp_bias"),
        *TWO_NORMS,
    ),
    sizes={**kv_heads(20), **head_dim(128)},
)
SEED_OSS = replace(
    LLAMA,
    model_types=("seed_oss",),
    layer=(*attention(out_bias="attention_out_bias"), *gated_mlp("mlp_bias"), *TWO_NORMS),
    flags={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    sizes={**kv_heads(8), **head_dim(128)},
)
ARCEE = replace(
    LLAMA,
    model_types=("arcee",),
    layer=(
        *attention(),
        LinearSpec("mlp.up_proj", "hidden", "inner", "mlp", "mlp_bias"),
        LinearSpec("mlp.down_proj", "inner", "hidden", "mlp", "mlp_bias"),
        *TWO_NORMS,
    ),
    activation="relu2",
    gated=False,
)
NEMOTRON = replace(
    ARCEE,
    model_types=("nemotron",),
    layer=(*ARCEE.layer[:-2], *BIASED_TWO_NORMS),
    top_level=(NormSpec("norm", bias=True),),
)
HUNYUAN = replace(
    LLAMA,
    model_types=("hunyuan_v1_dense",),
    layer=(
        *attention(),
        NormSpec("self_attn.query_layernorm", "head_dim"),
        NormSpec("self_attn.key_layernorm", "head_dim"),
        *gated_mlp(),
        *TWO_NORMS,
    ),
    flags=ATTENTION_BIAS,
)
ERNIE = replace(
    LLAMA,
    model_types=("ernie4_5",),
    layer=(*attention("use_bias"), *gated_mlp("use_bias"), *TWO_NORMS),
    flags={"use_bias": False},
    sizes={**kv_heads(2), **head_dim(128)},
    tied=True,
)

MISTRAL = Family(
    model_types=("mistral",),
    layer=(*attention(False), *gated_mlp(), *TWO_NORMS),
    sizes=kv_heads(8),
)
MINISTRAL = replace(MISTRAL, model_types=("ministral3",), sizes={**kv_heads(8), **head_dim(128)})

QWEN2 = replace(
    MISTRAL,
    model_types=("qwen2",),
    layer=(*attention(True, out_bias=False), *gated_mlp(), *TWO_NORMS),
    sizes=kv_heads(32),
)
QWEN3 = Family(
    model_types=("qwen3",),
    layer=(*attention(), *HEAD_NORMS, *gated_mlp(), *TWO_NORMS),
    flags=ATTENTION_BIAS,
    sizes={**kv_heads(32), **head_dim(128)},
)

GEMMA = Family(
    model_types=("gemma",),
    layer=(*attention(), *gated_mlp(), *TWO_NORMS),
    flags=ATTENTION_BIAS,
    sizes={**kv_heads(16), **head_dim(256)},
    tied=True,
    activation="gelu_pytorch_tanh",
)
GEMMA2 = replace(
    GEMMA,
    model_types=("gemma2",),
    layer=(*attention(), *gated_mlp(), *FOUR_NORMS),
    sizes={**kv_heads(4), **head_dim(256)},
)
GEMMA3 = replace(
    GEMMA2,
    model_types=("gemma3_text",),
    layer=(*attention(), *HEAD_NORMS, *gated_mlp(), *FOUR_NORMS),
    # The published multimodal configs rely on the class defaults.
    sizes={
        "heads": SizeField(("num_attention_heads",), default=8),
        **kv_heads(4),
        **head_dim(256),
        "vocab": SizeField(("vocab_size",), default=262_208),
        "inner": SizeField(("intermediate_size",), default=9216),
        "positions": SizeField(("max_position_embeddings",), default=131_072),
    },
)

OLMO = replace(
    LLAMA,
    model_types=("olmo",),
    layer=(*attention(), *gated_mlp()),
    top_level=(),
    flags=ATTENTION_BIAS,
)
OLMO2 = replace(
    OLMO,
    model_types=("olmo2", "olmo3"),
    layer=(*attention(), *WIDE_NORMS, *gated_mlp(), *POST_NORMS),
    top_level=(NormSpec("norm"),),
)
EXAONE4 = replace(
    OLMO2,
    model_types=("exaone4",),
    layer=(*attention(False), *HEAD_NORMS, *gated_mlp(), *POST_NORMS),
    flags={},
    sizes=kv_heads(32),
)

COHERE = Family(
    model_types=("cohere",),
    own_norms=True,
    layer=(
        *attention(),
        ParameterSpec("self_attn.q_norm.weight", ("heads", "head_dim"), "norm", "use_qk_norm"),
        ParameterSpec("self_attn.k_norm.weight", ("kv_heads", "head_dim"), "norm", "use_qk_norm"),
        *gated_mlp(),
        NormSpec("input_layernorm"),
    ),
    flags={"attention_bias": False, "use_qk_norm": False},
    tied=True,
)
COHERE2 = replace(
    COHERE,
    model_types=("cohere2",),
    own_norms=True,
    layer=(*attention(), *gated_mlp(), NormSpec("input_layernorm")),
    flags=ATTENTION_BIAS,
)

GLM = Family(
    model_types=("glm",),
    layer=(*attention(out_bias=False), *FUSED_GATED_MLP, *TWO_NORMS),
    flags={"attention_bias": True},
    sizes={**kv_heads(2), **head_dim(128)},
)
GLM4 = replace(
    GLM,
    model_types=("glm4",),
    layer=(*GLM.layer, NormSpec("post_self_attn_layernorm"), NormSpec("post_mlp_layernorm")),
)

PHI3 = Family(
    model_types=("phi3",),
    layer=(
        LinearSpec("self_attn.o_proj", "q", "hidden", "attention"),
        LinearSpec("self_attn.qkv_proj", "hidden", "q+2*kv", "attention"),
        *FUSED_GATED_MLP,
        *TWO_NORMS,
    ),
)

STABLELM = Family(
    model_types=("stablelm",),
    layer=(
        *attention("use_qkv_bias", out_bias=False),
        NormSpec("self_attn.q_layernorm.norms", "head_dim", condition="qk_layernorm", repeat="heads"),
        NormSpec("self_attn.k_layernorm.norms", "head_dim", condition="qk_layernorm", repeat="kv_heads"),
        *gated_mlp(),
        NormSpec("input_layernorm", bias=True),
        NormSpec("post_attention_layernorm", bias=True, condition="sequential"),
    ),
    top_level=(NormSpec("norm", bias=True),),
    flags={"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False},
    sizes=kv_heads(32),
    adjust=lambda _fields, sizes: sizes.update(sequential=1 - sizes["use_parallel_residual"]),
)

STARCODER2 = Family(
    model_types=("starcoder2",),
    layer=(
        *attention("use_bias"),
        LinearSpec("mlp.c_fc", "hidden", "inner", "mlp", "use_bias"),
        LinearSpec("mlp.c_proj", "inner", "hidden", "mlp", "use_bias"),
        *BIASED_TWO_NORMS,
    ),
    top_level=(NormSpec("norm", bias=True),),
    flags={"use_bias": True},
    sizes=kv_heads(2),
    tied=True,
    activation="gelu_pytorch_tanh",
    gated=False,
)

PHI = Family(
    model_types=("phi",),
    layer=(
        LinearSpec("self_attn.q_proj", "hidden", "q", "attention", bias=True),
        LinearSpec("self_attn.k_proj", "hidden", "kv", "attention", bias=True),
        LinearSpec("self_attn.v_proj", "hidden", "kv", "attention", bias=True),
        LinearSpec("self_attn.dense", "q", "hidden", "attention", bias=True),
        NormSpec("self_attn.q_layernorm", "hidden_per_head", bias=True, condition="qk_layernorm"),
        NormSpec("self_attn.k_layernorm", "hidden_per_head", bias=True, condition="qk_layernorm"),
        LinearSpec("mlp.fc1", "hidden", "inner", "mlp", bias=True),
        LinearSpec("mlp.fc2", "inner", "hidden", "mlp", bias=True),
        NormSpec("input_layernorm", bias=True),
    ),
    top_level=(NormSpec("final_layernorm", bias=True),),
    head=LinearSpec("lm_head", "hidden", "vocab", bias=True),
    flags={"qk_layernorm": False},
    activation="gelu_new",
    gated=False,
)

FAMILIES = (
    LLAMA, SMOLLM3, GRANITE, HELIUM, SEED_OSS, ARCEE, NEMOTRON, HUNYUAN, ERNIE, MISTRAL, MINISTRAL,
    QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO, OLMO2, EXAONE4, COHERE, COHERE2, GLM, GLM4, PHI3,
    STABLELM, STARCODER2, PHI,
)  # fmt: skip
