"""How llama.cpp stores each supported family: names and values of its tensors.

transformers and llama.cpp differ in two conventions:

* Rotary embedding. transformers rotates row i of a head with row i + d/2 (d: rotated rows). llama.cpp does
  the same for most families, but rotates neighboring rows, 2i and 2i + 1, for Llama and its relatives: their
  rows of q and k are stored in that order. With d = 4, rows ``0 1 2 3`` of a head become ``0 2 1 3``.
* Gemma's norms multiply by 1 + w in transformers, and by the stored weight in llama.cpp.

Names are those of the ``gguf`` package; how each family is computed: llama.cpp, src/models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qlora_tui.errors import UserError

_OUTER_NAMES = ("model.language_model.", "language_model.model.", "model.")
"""Prefixes of the text model's weights, the longest first; multimodal models have one of the first two."""
_NOT_TEXT = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.|.*rotary_emb\.inv_freq"
)


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """Conventions of one family."""

    architecture: str
    """``general.architecture``."""
    interleaved_rope: bool = False
    """Whether llama.cpp's rotary embedding rotates neighboring rows of q and k."""
    norm_offset: float = 0.0
    """Added to each norm's weight."""
    activation: str = "silu"
    normalizes_experts: bool | None = None
    """Whether llama.cpp makes the weights of a token's experts add up to 1; None for a dense family."""


FAMILIES = {
    "llama": GgufFamily("llama", interleaved_rope=True),
    "mistral": GgufFamily("llama", interleaved_rope=True),
    "smollm3": GgufFamily("smollm3", interleaved_rope=True),
    "granite": GgufFamily("granite", interleaved_rope=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily("gemma2", norm_offset=1.0, activation="gelu_pytorch_tanh"),
    "gemma3_text": GgufFamily("gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh"),
    "phi3": GgufFamily("phi3"),
    "olmo2": GgufFamily("olmo2"),
    "glm4": GgufFamily("glm4"),
    "mixtral": GgufFamily("llama", interleaved_rope=True, normalizes_experts=True),
    "qwen2_moe": GgufFamily("qwen2moe", normalizes_experts=False),
    "qwen3_moe": GgufFamily("qwen3moe", normalizes_experts=True),
}
"""By transformers' ``model_type``."""


def family_of(config: Any) -> GgufFamily:
    """Return the family of a transformers text config. Raises UserError for one that is not supported."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            "This family cannot be exported as GGUF",
            what=f"The model's type is {config.model_type}; supported: {', '.join(sorted(FAMILIES))}.",
            fix="Export it with `qlora-tui export merge` and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py.",
        )
    return family


@dataclass(frozen=True)
class TensorNames:
    """Maps the tensors of one model to those of its GGUF file."""

    config: Any
    """transformers' text config."""

    @cached_property
    def family(self) -> GgufFamily:
        """Return the model's family. Raises UserError."""
        return family_of(self.config)

    @cached_property
    def _map(self) -> Any:
        import gguf

        by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(by_name[self.family.architecture], self.config.num_hidden_layers)

    def name_of(self, tensor: str) -> str | None:
        """Return the GGUF name of a tensor of a weight file; None for one that GGUF leaves out.

        Left out are a tied head, which llama.cpp takes from the embedding, and the parts of a multimodal
        model that do not read text. Raises UserError for an unknown tensor.
        """
        if _NOT_TEXT.match(tensor) or (tensor == "lm_head.weight" and self.config.tie_word_embeddings):
            return None
        inner = tensor
        for outer in _OUTER_NAMES:
            if tensor.startswith(outer):
                inner = f"model.{tensor.removeprefix(outer)}"
                break
        name: str | None = self._map.get_name(inner, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                "This model cannot be exported as GGUF",
                what=f"It has a tensor {tensor}, which llama.cpp's {self.family.architecture} lacks.",
                fix="Export it with `qlora-tui export merge`, and report the model.",
            )
        return name

    def transform_for(self, tensor: str) -> Callable[[Tensor], Tensor] | None:
        """Return how llama.cpp's values differ from the tensor's; None where they are equal."""
        offset = self.family.norm_offset
        if offset and tensor.endswith("norm.weight"):
            return lambda values: values.float() + offset
        if self.family.interleaved_rope:
            config = self.config
            for module, heads in (
                (".q_proj.", config.num_attention_heads),
                (".k_proj.", config.num_key_value_heads),
            ):
                if module in tensor:
                    return lambda values, heads=heads: permute_for_interleaved_rope(values, heads)  # type: ignore[misc]
        return None


def permute_for_interleaved_rope(values: Tensor, heads: int) -> Tensor:
    """Order the rows of q or k, (rows, …), for a rotary embedding of neighboring rows.

    With one head of four rows, ``0 1 2 3`` become ``0 2 1 3``.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Return tensors that only GGUF has: factors that divide the rotary embedding's frequencies, float32.

    For ``llama3`` scaling: one factor per frequency, (head size / 2), of which transformers computes the
    scaled frequencies itself. For ``longrope``: the config's two lists.
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
        dim = 2 * len(scaled)
        plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        return {"rope_freqs.weight": plain / scaled}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


def rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary embedding's parameters of the layers with full attention."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    return dict(parameters.get("full_attention", parameters))
