"""Decoders before Llama: learned positions, fused projections, plain MLPs, biases."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.catalog.family_spec import (
    ConfigFields,
    EmbeddingSpec,
    Family,
    LayerEntry,
    LinearSpec,
    NormSpec,
    SizeField,
)

FOUR_TIMES = {"inner": SizeField(("n_inner", "intermediate_size"), default="4*hidden")}
GPT_TABLES = (EmbeddingSpec("wte", "vocab", "hidden"), EmbeddingSpec("wpe", "positions", "hidden"))
GPT_NORMS = (NormSpec("ln_1", bias=True), NormSpec("ln_2", bias=True))


def _gpt2_layer(qkv: str, conv1d: bool) -> tuple[LayerEntry, ...]:
    return (
        LinearSpec("attn.c_attn", "hidden", qkv, "attention", bias=True, conv1d=conv1d),
        LinearSpec("attn.c_proj", "hidden", "hidden", "attention", bias=True, conv1d=conv1d),
        LinearSpec("mlp.c_fc", "hidden", "inner", "mlp", bias=True, conv1d=conv1d),
        LinearSpec("mlp.c_proj", "inner", "hidden", "mlp", bias=True, conv1d=conv1d),
        *GPT_NORMS,
    )


GPT2 = Family(
    model_types=("gpt2",),
    layer=_gpt2_layer("3*hidden", conv1d=True),
    base="transformer",
    blocks="h",
    embedding_tables=GPT_TABLES,
    top_level=(NormSpec("ln_f", bias=True),),
    sizes={**FOUR_TIMES, "positions": SizeField(("n_positions", "max_position_embeddings"), default=1024)},
    tied=True,
    activation="gelu_new",
    gated=False,
)


def _one_kv_head(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Apply ``multi_query``: all heads share one key and one value head."""
    if sizes["multi_query"]:
        sizes["kv_heads"] = 1


GPT_BIGCODE = replace(
    GPT2,
    model_types=("gpt_bigcode",),
    layer=_gpt2_layer("hidden+2*kv", conv1d=False),
    flags={"multi_query": True},
    adjust=_one_kv_head,
    activation="gelu_pytorch_tanh",
)

GPT_NEO = replace(
    GPT2,
    model_types=("gpt_neo",),
    layer=(
        LinearSpec("attn.attention.k_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.attention.v_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.attention.q_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.attention.out_proj", "hidden", "hidden", "attention", bias=True),
        LinearSpec("mlp.c_fc", "hidden", "inner", "mlp", bias=True),
        LinearSpec("mlp.c_proj", "inner", "hidden", "mlp", bias=True),
        *GPT_NORMS,
    ),
    sizes={**FOUR_TIMES, "positions": SizeField(("max_position_embeddings",), default=2048)},
)

GPT_J = Family(
    model_types=("gptj",),
    layer=(
        LinearSpec("attn.k_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.v_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.q_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.out_proj", "hidden", "hidden", "attention"),
        LinearSpec("mlp.fc_in", "hidden", "inner", "mlp", bias=True),
        LinearSpec("mlp.fc_out", "inner", "hidden", "mlp", bias=True),
        NormSpec("ln_1", bias=True),
    ),
    base="transformer",
    blocks="h",
    embedding_tables=(EmbeddingSpec("wte", "vocab", "hidden"),),
    top_level=(NormSpec("ln_f", bias=True),),
    head=LinearSpec("lm_head", "hidden", "vocab", bias=True),
    sizes=FOUR_TIMES,
    activation="gelu_new",
    gated=False,
)
CODEGEN = replace(
    GPT_J,
    model_types=("codegen",),
    layer=(
        LinearSpec("attn.out_proj", "hidden", "hidden", "attention"),
        LinearSpec("attn.qkv_proj", "hidden", "3*hidden", "attention"),
        *GPT_J.layer[4:],
    ),
)

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    layer=(
        LinearSpec("attention.query_key_value", "hidden", "3*hidden", "attention", "attention_bias"),
        LinearSpec("attention.dense", "hidden", "hidden", "attention", "attention_bias"),
        LinearSpec("mlp.dense_h_to_4h", "hidden", "inner", "mlp", bias=True),
        LinearSpec("mlp.dense_4h_to_h", "inner", "hidden", "mlp", bias=True),
        NormSpec("input_layernorm", bias=True),
        NormSpec("post_attention_layernorm", bias=True),
    ),
    base="gpt_neox",
    embedding_tables=(EmbeddingSpec("embed_in", "vocab", "hidden"),),
    top_level=(NormSpec("final_layer_norm", bias=True),),
    flags={"attention_bias": True},
    activation="gelu",
    gated=False,
)

BLOOM = Family(
    model_types=("bloom",),
    own_attention=True,
    layer=(
        LinearSpec("self_attention.query_key_value", "hidden", "3*hidden", "attention", bias=True),
        LinearSpec("self_attention.dense", "hidden", "hidden", "attention", bias=True),
        LinearSpec("mlp.dense_h_to_4h", "hidden", "inner", "mlp", bias=True),
        LinearSpec("mlp.dense_4h_to_h", "inner", "hidden", "mlp", bias=True),
        NormSpec("input_layernorm", bias=True),
        NormSpec("post_attention_layernorm", bias=True),
    ),
    base="transformer",
    blocks="h",
    embedding_tables=(EmbeddingSpec("word_embeddings", "vocab", "hidden"),),
    top_level=(NormSpec("word_embeddings_layernorm", bias=True), NormSpec("ln_f", bias=True)),
    # The class always uses four times the width, whatever n_inner says.
    sizes={"inner": SizeField((), default="4*hidden")},
    tied=True,
    activation="bloom_gelu",
    gated=False,
)


def _falcon(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Set the sizes of Falcon's three attention variants and three norm placements.

    The file's ``num_kv_heads`` applies to the newer architecture only.
    """
    if not sizes["new_decoder_architecture"]:
        sizes["kv_heads"] = 1 if sizes["multi_query"] else sizes["heads"]
    two = fields.size(("num_ln_in_parallel_attn",)) or (2 if sizes["new_decoder_architecture"] else 1)
    sizes["two_norms"] = int(sizes["parallel_attn"] and two == 2)
    sizes["input_norm"] = 1 - sizes["two_norms"]
    sizes["sequential"] = 1 - sizes["parallel_attn"]


FALCON = Family(
    model_types=("falcon",),
    own_attention=True,
    # FalconLinear is a subclass of nn.Linear, and bitsandbytes' integration only replaces nn.Linear itself.
    layer=(
        LinearSpec(
            "self_attention.query_key_value", "hidden", "hidden+2*kv", "attention", "bias", quantizable=False
        ),
        LinearSpec("self_attention.dense", "hidden", "hidden", "attention", "bias", quantizable=False),
        LinearSpec("mlp.dense_h_to_4h", "hidden", "inner", "mlp", "bias", quantizable=False),
        LinearSpec("mlp.dense_4h_to_h", "inner", "hidden", "mlp", "bias", quantizable=False),
        NormSpec("ln_attn", bias=True, condition="two_norms"),
        NormSpec("ln_mlp", bias=True, condition="two_norms"),
        NormSpec("input_layernorm", bias=True, condition="input_norm"),
        NormSpec("post_attention_layernorm", bias=True, condition="sequential"),
    ),
    base="transformer",
    blocks="h",
    embedding_tables=(EmbeddingSpec("word_embeddings", "vocab", "hidden"),),
    top_level=(NormSpec("ln_f", bias=True),),
    flags={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    sizes={
        "kv_heads": SizeField(("num_kv_heads", "n_head_kv"), default="heads"),
        "inner": SizeField(("ffn_hidden_size",), default="4*hidden"),
        "positions": SizeField(("max_position_embeddings",), default=2048),
    },
    adjust=_falcon,
    tied=True,
    activation="gelu",
    gated=False,
)


def _opt(fields: ConfigFields, sizes: dict[str, int]) -> None:
    """Set the sizes of OPT; the smallest has a narrower embedding, and norms after each half."""
    sizes["projected"] = int(sizes["embed"] != sizes["hidden"])
    final = sizes["do_layer_norm_before"] and not sizes["_remove_final_layer_norm"]
    sizes["final_norm"] = int(final and sizes["layer_norm_elementwise_affine"])


OPT = Family(
    model_types=("opt",),
    layer=(
        LinearSpec("self_attn.k_proj", "hidden", "hidden", "attention", "enable_bias"),
        LinearSpec("self_attn.v_proj", "hidden", "hidden", "attention", "enable_bias"),
        LinearSpec("self_attn.q_proj", "hidden", "hidden", "attention", "enable_bias"),
        LinearSpec("self_attn.out_proj", "hidden", "hidden", "attention", "enable_bias"),
        NormSpec("self_attn_layer_norm", bias=True, condition="layer_norm_elementwise_affine"),
        LinearSpec("fc1", "hidden", "inner", "mlp", "enable_bias"),
        LinearSpec("fc2", "inner", "hidden", "mlp", "enable_bias"),
        NormSpec("final_layer_norm", bias=True, condition="layer_norm_elementwise_affine"),
    ),
    base="model.decoder",
    embedding_tables=(
        EmbeddingSpec("embed_tokens", "vocab", "embed"),
        EmbeddingSpec("embed_positions", "positions+2", "hidden"),
    ),
    top_level=(
        LinearSpec("project_out", "hidden", "embed", "other", condition="projected"),
        LinearSpec("project_in", "embed", "hidden", "other", condition="projected"),
        NormSpec("final_layer_norm", bias=True, condition="final_norm"),
    ),
    head=LinearSpec("lm_head", "embed", "vocab"),
    flags={
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
    },
    sizes={
        "inner": SizeField(("ffn_dim",)),
        "embed": SizeField(("word_embed_proj_dim",), default="hidden"),
        "positions": SizeField(("max_position_embeddings",), default=2048),
    },
    adjust=_opt,
    tied=True,
    activation="relu",
    gated=False,
)

FAMILIES = (GPT2, GPT_BIGCODE, GPT_NEO, GPT_J, CODEGEN, GPT_NEOX, BLOOM, FALCON, OPT)
