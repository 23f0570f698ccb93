"""How llama.cpp stores each supported family: names and values of its tensors.

transformers and llama.cpp differ in two conventions:

* Rotary embedding. transformers rotates row i of a head with row i + d/2 (d: rotated rows). llama.cpp does
  the same for most families, but rotates neighboring rows, 2i and 2i + 1, for Llama and its relatives: their
  rows of q and k are stored in that order. With d = 4, rows ``0 1 2 3`` of a head become ``0 2 1 3``.
* Gemma's norms multiply by 1 + w in transformers, and by the stored weight in llama.cpp.

Names are those of the ``gguf`` package; how each family is computed: llama.cpp, src/models.

The sizes and constants of a model as GGUF keys, and what llama.cpp cannot compute about it.

What llama.cpp reads of each architecture: src/models, ``load_arch_hparams``.
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


_PERIODS = {"gemma2": 2, "gemma3": 6}
"""Of this many layers, llama.cpp computes the last with full attention and the others with a window."""
_ORDINALS = {2: "second", 6: "sixth"}
_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Number of layers by which llama.cpp recognizes Gemma's 27B, whose attention is scaled differently."""
_NO_ROPE_PERIOD = 4
"""llama.cpp leaves out the rotary embedding in each fourth layer of SmolLM3."""


@dataclass(frozen=True)
class Hyperparameters:
    """GGUF keys of one model."""

    values: dict[str, int | float | str | list[bool]]
    """By key, without the architecture's prefix (``block_count``)."""
    notes: tuple[str, ...] = ()
    """Sentences about what llama.cpp computes differently, and what was done about it."""


def hyperparameters(config: Any) -> Hyperparameters:
    """Return the keys of a transformers text config. Raises UserError for what llama.cpp cannot compute."""
    family = family_of(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rope_parameters(config)
    rotated = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    context, notes = _context_length(config, family)
    values: dict[str, int | float | str | list[bool]] = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": int(head_size * rotated),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    _check_activation(config, family)
    values |= _rope_scaling(config, rope)
    if family.architecture in _PERIODS:
        values |= _gemma(config, family)
    if family.normalizes_experts is not None:
        values |= _experts(config, family)
    if family.architecture == "granite":
        values |= {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    if family.architecture == "phi3":
        values["attention.sliding_window"] = 0
    if family.architecture == "smollm3":
        usual = [int((layer + 1) % _NO_ROPE_PERIOD != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != usual:
            raise _not_computed("the layers without rotary embedding are not exactly every fourth one")
    return Hyperparameters(values, notes)


def _context_length(config: Any, family: GgufFamily) -> tuple[int, tuple[str, ...]]:
    """Return the context length, less where llama.cpp computes the rest otherwise, and notes on that.

    llama.cpp uses longrope's long factors for every text once its context is longer than the original one
    (src/llama-model.cpp, ``get_rope_factors``); transformers only for a text that is longer itself.
    """
    length: int = config.max_position_embeddings
    notes = []
    rope = rope_parameters(config)
    if rope.get("rope_type") == "longrope":
        whole, length = length, rope.get("original_max_position_embeddings") or length
        if length < whole:
            override = f"--override-kv {family.architecture}.context_length=int:{whole} -c {whole}"
            notes.append(
                f"The file's context length is {length:,} tokens: with a longer one, llama.cpp computes "
                f"short texts otherwise than the training did (longrope). For longer texts, add {override}."
            )
    window: int = getattr(config, "sliding_window", None) or length
    layers = getattr(config, "layer_types", None)
    has_windows = not layers or "sliding_attention" in layers
    if family.architecture not in _PERIODS and has_windows and window < length:
        length = window
        notes.append(
            f"Each token attends to the {window:,} before it, which llama.cpp lacks for this family. "
            f"The file's context length is {window:,} tokens, so that the answers agree."
        )
    return length, tuple(notes)


def _check_activation(config: Any, family: GgufFamily) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise _not_computed(f"its activation is {activation}, not {family.activation}")


def _rope_scaling(config: Any, rope: dict[str, Any]) -> dict[str, int | float | str | list[bool]]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "yarn":
        keys = {
            "attention_factor": "attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        } | {f"rope.scaling.{key}": float(rope[name]) for name, key in keys.items() if rope.get(name)}
    if kind == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, device=None)
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(attention_factor),
        }
    raise _not_computed(f"its rotary embedding is scaled by {kind}")


def _experts(config: Any, family: GgufFamily) -> dict[str, int | float | str | list[bool]]:
    if getattr(config, "norm_topk_prob", True) != family.normalizes_experts:
        how = "does not add" if family.normalizes_experts else "adds"
        raise _not_computed(f"it {how} up the weights of a token's experts to 1")
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise _not_computed("some of its layers have no experts")
    if getattr(config, "clip_qkv", None):
        raise _not_computed("it clips queries, keys and values")
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    values: dict[str, int | float | str | list[bool]] = {
        "expert_count": config.num_local_experts
        if hasattr(config, "num_local_experts")
        else config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width,
    }
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        values["expert_shared_feed_forward_length"] = shared
    return values


def _gemma(config: Any, family: GgufFamily) -> dict[str, int | float | str | list[bool]]:
    name = family.architecture
    period = _PERIODS[name]
    full = [(layer + 1) % period == 0 for layer in range(config.num_hidden_layers)]
    if [kind == "full_attention" for kind in config.layer_types] != full:
        raise _not_computed(f"full attention is not in every {_ORDINALS[period]} layer")
    is_27b = config.num_hidden_layers == _27B_LAYERS[name]
    scaled_by = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != scaled_by:
        raise _not_computed(f"its attention is scaled by {config.query_pre_attn_scalar}, not {scaled_by}")
    values: dict[str, int | float | str | list[bool]] = {"attention.sliding_window": config.sliding_window}
    sliding = dict(config.rope_parameters).get("sliding_attention")
    if sliding:
        if sliding.get("rope_type", "default") != "default":
            raise _not_computed("the rotary embedding of its sliding layers is scaled")
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.attn_logit_softcapping:
        if name == "gemma3":
            raise _not_computed("its attention logits are capped")
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    return values


def _not_computed(why: str) -> UserError:
    return UserError(
        "This model cannot be exported as GGUF",
        what=f"llama.cpp cannot compute it: {why}.",
        fix="Export it with `qlora-tui export merge`; transformers and vLLM can load that folder.",
    )
