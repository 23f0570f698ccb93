"""Models with eyes: a text family under another name, and the tower transformers builds beside it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.catalog.config_fields import ConfigFields, bad_config
from qlora_tui.catalog.template import Entry, Family, Linear, Norm, Size, Tensor


@dataclass(frozen=True)
class Composite:
    """A config that nests the language model's under ``text_config``."""

    model_type: str
    text: str
    """``model_type`` of the language model's family."""
    base: str = "model"
    """Where the language model stands."""
    tower: Family | None = None
    """What is built from ``vision_config``; names are relative to ``model``, ``text_hidden`` is a size."""
    tied: bool | None = None
    """Class default of the outer ``tie_word_embeddings``; None: the inner one decides."""


def _siglip_sizes(fields: ConfigFields, sizes: dict[str, int]) -> None:
    if fields.flag("vision_use_head", True):
        raise bad_config(fields.where, "vision_use_head is not false: such a tower is not known here")
    sizes["patches"] = (sizes["image"] // sizes["patch"]) ** 2


SIGLIP = Family(
    model_types=("siglip_vision_model",),
    base="model",
    blocks="vision_tower.encoder.layers",
    layer=(
        Norm("layer_norm1", bias=True),
        Linear("self_attn.k_proj", "hidden", "hidden", bias=True),
        Linear("self_attn.v_proj", "hidden", "hidden", bias=True),
        Linear("self_attn.q_proj", "hidden", "hidden", bias=True),
        Linear("self_attn.out_proj", "hidden", "hidden", bias=True),
        Norm("layer_norm2", bias=True),
        Linear("mlp.fc1", "hidden", "inner", bias=True),
        Linear("mlp.fc2", "inner", "hidden", bias=True),
    ),
    tables=(),
    outside=(
        Tensor(
            "vision_tower.embeddings.patch_embedding.weight",
            ("hidden", "channels", "patch", "patch"),
            "vision",
        ),
        Tensor("vision_tower.embeddings.patch_embedding.bias", ("hidden",), "vision"),
        Tensor("vision_tower.embeddings.position_embedding.weight", ("patches", "hidden"), "vision"),
        Norm("vision_tower.post_layernorm", bias=True),
        Tensor("multi_modal_projector.mm_input_projection_weight", ("hidden", "text_hidden"), "vision"),
        Norm("multi_modal_projector.mm_soft_emb_norm"),
    ),
    sizes={
        "vocab": Size((), absent=0),
        "image": Size(("image_size",), absent=224),
        "patch": Size(("patch_size",), absent=16),
        "channels": Size(("num_channels",), absent=3),
    },
    adjust=_siglip_sizes,
)


def _clippable(name: str, fan_in: str, fan_out: str) -> Entry:
    return Linear(f"{name}.linear", fan_in, fan_out)


def _gemma4_vision(fields: ConfigFields, sizes: dict[str, int]) -> None:
    if fields.flag("use_clipped_linears", False):
        raise bad_config(fields.where, "use_clipped_linears is true, which is not known here")


GEMMA4_VISION = Family(
    model_types=("gemma4_vision",),
    base="model",
    blocks="vision_tower.encoder.layers",
    layer=(
        _clippable("self_attn.q_proj", "hidden", "q"),
        _clippable("self_attn.k_proj", "hidden", "kv"),
        _clippable("self_attn.v_proj", "hidden", "kv"),
        _clippable("self_attn.o_proj", "q", "hidden"),
        Norm("self_attn.q_norm", "head_dim"),
        Norm("self_attn.k_norm", "head_dim"),
        _clippable("mlp.gate_proj", "hidden", "inner"),
        _clippable("mlp.up_proj", "hidden", "inner"),
        _clippable("mlp.down_proj", "inner", "hidden"),
        Norm("input_layernorm"),
        Norm("post_attention_layernorm"),
        Norm("pre_feedforward_layernorm"),
        Norm("post_feedforward_layernorm"),
    ),
    tables=(),
    outside=(
        Tensor(
            "vision_tower.patch_embedder.position_embedding_table", ("2", "positions", "hidden"), "vision"
        ),
        Linear("vision_tower.patch_embedder.input_proj", "3*patch*patch", "hidden"),
        # The last parameter of the model, which transformers leaves alone when it quantises.
        Linear("embed_vision.embedding_projection", "hidden", "text_hidden", quantizable=False),
    ),
    sizes={
        "vocab": Size((), absent=0),
        "head_dim": Size(("head_dim",), absent=64),
        "patch": Size(("patch_size",), absent=16),
        "positions": Size(("position_embedding_size",), absent=10_240),
    },
    adjust=_gemma4_vision,
)

COMPOSITES = (
    Composite("gemma3", "gemma3_text", base="model.language_model", tower=SIGLIP, tied=True),
    Composite("gemma4", "gemma4_text", base="model.language_model", tower=GEMMA4_VISION, tied=True),
    # AutoModelForCausalLM builds the language model alone.
    Composite("qwen3_5", "qwen3_5_text"),
    Composite("qwen3_5_moe", "qwen3_5_moe_text"),
)
