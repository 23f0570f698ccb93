"""Vision-language models: a text family under another name, and the tower that transformers adds to it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.family_spec import (
    ConfigFields,
    Family,
    LayerEntry,
    LinearSpec,
    NormSpec,
    NotInTableError,
    ParameterSpec,
    SizeField,
)


@dataclass(frozen=True)
class Composite:
    """A config that nests the language model's under ``text_config``."""

    model_type: str
    text: str
    """Value of ``model_type`` for the language model's family."""
    base: str = "model"
    """Path of the language model."""
    tower: Family | None = None
    """Structure built from ``vision_config``; names are relative to ``model``, ``text_hidden`` is a size."""
    tied: bool | None = None
    """Class default of the outer ``tie_word_embeddings``; None if the inner one decides."""


def _siglip_sizes(fields: ConfigFields, sizes: dict[str, int]) -> None:
    if fields.flag("vision_use_head", True):
        raise NotInTableError
    sizes["patches"] = (sizes["image"] // sizes["patch"]) ** 2


SIGLIP = Family(
    model_types=("siglip_vision_model",),
    base="model",
    blocks="vision_tower.encoder.layers",
    layer=(
        NormSpec("layer_norm1", bias=True),
        LinearSpec("self_attn.k_proj", "hidden", "hidden", bias=True),
        LinearSpec("self_attn.v_proj", "hidden", "hidden", bias=True),
        LinearSpec("self_attn.q_proj", "hidden", "hidden", bias=True),
        LinearSpec("self_attn.out_proj", "hidden", "hidden", bias=True),
        NormSpec("layer_norm2", bias=True),
        LinearSpec("mlp.fc1", "hidden", "inner", bias=True),
        LinearSpec("mlp.fc2", "inner", "hidden", bias=True),
    ),
    embedding_tables=(),
    top_level=(
        ParameterSpec(
            "vision_tower.embeddings.patch_embedding.weight",
            ("hidden", "channels", "patch", "patch"),
            "vision",
        ),
        ParameterSpec("vision_tower.embeddings.patch_embedding.bias", ("hidden",), "vision"),
        ParameterSpec("vision_tower.embeddings.position_embedding.weight", ("patches", "hidden"), "vision"),
        NormSpec("vision_tower.post_layernorm", bias=True),
        ParameterSpec(
            "multi_modal_projector.mm_input_projection_weight", ("hidden", "text_hidden"), "vision"
        ),
        NormSpec("multi_modal_projector.mm_soft_emb_norm"),
    ),
    sizes={
        "vocab": SizeField((), default=0),
        "image": SizeField(("image_size",), default=224),
        "patch": SizeField(("patch_size",), default=16),
        "channels": SizeField(("num_channels",), default=3),
    },
    adjust=_siglip_sizes,
)


def _clippable(name: str, fan_in: str, fan_out: str) -> LayerEntry:
    return LinearSpec(f"{name}.linear", fan_in, fan_out)


def _gemma4_vision(fields: ConfigFields, sizes: dict[str, int]) -> None:
    if fields.flag("use_clipped_linears", False):
        raise NotInTableError


GEMMA4_VISION = Family(
    model_types=("gemma4_vision",),
    base="model",
    blocks="vision_tower.encoder.layers",
    layer=(
        _clippable("self_attn.q_proj", "hidden", "q"),
        _clippable("self_attn.k_proj", "hidden", "kv"),
        _clippable("self_attn.v_proj", "hidden", "kv"),
        _clippable("self_attn.o_proj", "q", "hidden"),
        NormSpec("self_attn.q_norm", "head_dim"),
        NormSpec("self_attn.k_norm", "head_dim"),
        _clippable("mlp.gate_proj", "hidden", "inner"),
        _clippable("mlp.up_proj", "hidden", "inner"),
        _clippable("mlp.down_proj", "inner", "hidden"),
        NormSpec("input_layernorm"),
        NormSpec("post_attention_layernorm"),
        NormSpec("pre_feedforward_layernorm"),
        NormSpec("post_feedforward_layernorm"),
    ),
    embedding_tables=(),
    top_level=(
        ParameterSpec(
            "vision_tower.patch_embedder.position_embedding_table", ("2", "positions", "hidden"), "vision"
        ),
        LinearSpec("vision_tower.patch_embedder.input_proj", "3*patch*patch", "hidden"),
        # The model's last parameter, which transformers does not quantize.
        LinearSpec("embed_vision.embedding_projection", "hidden", "text_hidden", quantizable=False),
    ),
    sizes={
        "vocab": SizeField((), default=0),
        "head_dim": SizeField(("head_dim",), default=64),
        "patch": SizeField(("patch_size",), default=16),
        "positions": SizeField(("position_embedding_size",), default=10_240),
    },
    adjust=_gemma4_vision,
)

COMPOSITES = (
    Composite("gemma3", "gemma3_text", base="model.language_model", tower=SIGLIP, tied=True),
    Composite("gemma4", "gemma4_text", base="model.language_model", tower=GEMMA4_VISION, tied=True),
    # AutoModelForCausalLM builds only the language model.
    Composite("qwen3_5", "qwen3_5_text"),
    Composite("qwen3_5_moe", "qwen3_5_moe_text"),
)
