"""The sizes and constants of a model as GGUF keys, and what llama.cpp cannot compute about it.

What llama.cpp reads of each architecture: src/models, ``load_arch_hparams``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.families import GgufFamily, family_of, rope_parameters

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
