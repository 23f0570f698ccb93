"""Decoders with separate q, k, v, o projections and a gated MLP, and their near relatives."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.template import Entry, Family, Linear, Norm, Size, Tensor


def attention(bias: bool | str = "attention_bias", out_bias: bool | str | None = None) -> tuple[Entry, ...]:
    """The four projections; ``out_bias`` where the output's differs from the others'."""
    return (
        Linear("self_attn.q_proj", "hidden", "q", "attention", bias),
        Linear("self_attn.k_proj", "hidden", "kv", "attention", bias),
        Linear("self_attn.v_proj", "hidden", "kv", "attention", bias),
        Linear("self_attn.o_proj", "q", "hidden", "attention", bias if out_bias is None else out_bias),
    )


def gated_mlp(bias: bool | str = False, only: str = "") -> tuple[Entry, ...]:
    return (
        Linear("mlp.gate_proj", "hidden", "inner", "mlp", bias, only),
        Linear("mlp.up_proj", "hidden", "inner", "mlp", bias, only),
        Linear("mlp.down_proj", "inner", "hidden", "mlp", bias, only),
    )


FUSED_GATED_MLP = (
    Linear("mlp.gate_up_proj", "hidden", "2*inner", "mlp"),
    Linear("mlp.down_proj", "inner", "hidden", "mlp"),
)
TWO_NORMS = (Norm("input_layernorm"), Norm("post_attention_layernorm"))
POST_NORMS = (Norm("post_attention_layernorm"), Norm("post_feedforward_layernorm"))
FOUR_NORMS = (*TWO_NORMS, Norm("pre_feedforward_layernorm"), Norm("post_feedforward_layernorm"))
HEAD_NORMS = (Norm("self_attn.q_norm", "head_dim"), Norm("self_attn.k_norm", "head_dim"))
WIDE_NORMS = (Norm("self_attn.q_norm", "q"), Norm("self_attn.k_norm", "kv"))
BIASED_TWO_NORMS = (Norm("input_layernorm", bias=True), Norm("post_attention_layernorm", bias=True))


def kv_heads(absent: int) -> dict[str, Size]:
    """``num_key_value_heads`` with a class default; null means one for each head."""
    return {"kv_heads": Size(("num_key_value_heads",), absent=absent, null="heads")}


def head_dim(absent: int) -> dict[str, Size]:
    """``head_dim`` with a class default; null means hidden size over heads."""
    return {"head_dim": Size(("head_dim",), absent=absent, null="hidden_per_head")}


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
        Linear("self_attn.o_proj", "hidden", "hidden", "attention"),
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
        Linear("mlp.up_proj", "hidden", "inner", "mlp", "mlp_bias"),
        Linear("mlp.down_proj", "inner", "hidden", "mlp", "mlp_bias"),
        *TWO_NORMS,
    ),
    activation="relu2",
    gated=False,
)
NEMOTRON = replace(
    ARCEE,
    model_types=("nemotron",),
    layer=(*ARCEE.layer[:-2], *BIASED_TWO_NORMS),
    outside=(Norm("norm", bias=True),),
)
HUNYUAN = replace(
    LLAMA,
    model_types=("hunyuan_v1_dense",),
    layer=(
        *attention(),
        Norm("self_attn.query_layernorm", "head_dim"),
        Norm("self_attn.key_layernorm", "head_dim"),
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
    # The published multimodal configs leave these to the class.
    sizes={
        "heads": Size(("num_attention_heads",), absent=8),
        **kv_heads(4),
        **head_dim(256),
        "vocab": Size(("vocab_size",), absent=262_208),
        "inner": Size(("intermediate_size",), absent=9216),
        "positions": Size(("max_position_embeddings",), absent=131_072),
    },
)

OLMO = replace(
    LLAMA,
    model_types=("olmo",),
    layer=(*attention(), *gated_mlp()),
    outside=(),
    flags=ATTENTION_BIAS,
)
OLMO2 = replace(
    OLMO,
    model_types=("olmo2", "olmo3"),
    layer=(*attention(), *WIDE_NORMS, *gated_mlp(), *POST_NORMS),
    outside=(Norm("norm"),),
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
    layer=(
        *attention(),
        Tensor("self_attn.q_norm.weight", ("heads", "head_dim"), "norm", "use_qk_norm"),
        Tensor("self_attn.k_norm.weight", ("kv_heads", "head_dim"), "norm", "use_qk_norm"),
        *gated_mlp(),
        Norm("input_layernorm"),
    ),
    flags={"attention_bias": False, "use_qk_norm": False},
    tied=True,
)
COHERE2 = replace(
    COHERE,
    model_types=("cohere2",),
    layer=(*attention(), *gated_mlp(), Norm("input_layernorm")),
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
    layer=(*GLM.layer, Norm("post_self_attn_layernorm"), Norm("post_mlp_layernorm")),
)

PHI3 = Family(
    model_types=("phi3",),
    layer=(
        Linear("self_attn.o_proj", "q", "hidden", "attention"),
        Linear("self_attn.qkv_proj", "hidden", "q+2*kv", "attention"),
        *FUSED_GATED_MLP,
        *TWO_NORMS,
    ),
)

STABLELM = Family(
    model_types=("stablelm",),
    layer=(
        *attention("use_qkv_bias", out_bias=False),
        Norm("self_attn.q_layernorm.norms", "head_dim", only="qk_layernorm", repeat="heads"),
        Norm("self_attn.k_layernorm.norms", "head_dim", only="qk_layernorm", repeat="kv_heads"),
        *gated_mlp(),
        Norm("input_layernorm", bias=True),
        Norm("post_attention_layernorm", bias=True, only="sequential"),
    ),
    outside=(Norm("norm", bias=True),),
    flags={"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False},
    sizes=kv_heads(32),
    adjust=lambda _fields, sizes: sizes.update(sequential=1 - sizes["use_parallel_residual"]),
)

STARCODER2 = Family(
    model_types=("starcoder2",),
    layer=(
        *attention("use_bias"),
        Linear("mlp.c_fc", "hidden", "inner", "mlp", "use_bias"),
        Linear("mlp.c_proj", "inner", "hidden", "mlp", "use_bias"),
        *BIASED_TWO_NORMS,
    ),
    outside=(Norm("norm", bias=True),),
    flags={"use_bias": True},
    sizes=kv_heads(2),
    tied=True,
    activation="gelu_pytorch_tanh",
    gated=False,
)

PHI = Family(
    model_types=("phi",),
    layer=(
        Linear("self_attn.q_proj", "hidden", "q", "attention", bias=True),
        Linear("self_attn.k_proj", "hidden", "kv", "attention", bias=True),
        Linear("self_attn.v_proj", "hidden", "kv", "attention", bias=True),
        Linear("self_attn.dense", "q", "hidden", "attention", bias=True),
        Norm("self_attn.q_layernorm", "hidden_per_head", bias=True, only="qk_layernorm"),
        Norm("self_attn.k_layernorm", "hidden_per_head", bias=True, only="qk_layernorm"),
        Linear("mlp.fc1", "hidden", "inner", "mlp", bias=True),
        Linear("mlp.fc2", "inner", "hidden", "mlp", bias=True),
        Norm("input_layernorm", bias=True),
    ),
    outside=(Norm("final_layernorm", bias=True),),
    head=Linear("lm_head", "hidden", "vocab", bias=True),
    flags={"qk_layernorm": False},
    activation="gelu_new",
    gated=False,
)

FAMILIES = (
    LLAMA, SMOLLM3, GRANITE, HELIUM, SEED_OSS, ARCEE, NEMOTRON, HUNYUAN, ERNIE, MISTRAL, MINISTRAL,
    QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO, OLMO2, EXAONE4, COHERE, COHERE2, GLM, GLM4, PHI3,
    STABLELM, STARCODER2, PHI,
)  # fmt: skip
