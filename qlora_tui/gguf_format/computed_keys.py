"""Computes keys of a GGUF file from several settings of a config, and checks settings that have no key.

Each function takes transformers' text config, and returns keys (without the name of the architecture) and
values. It raises UserError if the config contradicts a value that is built into llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

from qlora_tui.errors import UserError


def cannot_compute(why: str) -> UserError:
    """Return the error for a model that llama.cpp would compute differently."""
    return UserError(
        "This model cannot be exported as GGUF",
        what=f"llama.cpp cannot compute the model: {why}.",
        fix="Export the model with `qlora-tui export merge`; transformers and vLLM can load the "
        "exported folder.",
    )


def rope_but_every_fourth(layers: int) -> list[int]:
    """Return 0 for every fourth layer, which has no rotary embedding, and 1 for the others
    (src/models/smollm3.cpp).
    """
    return [int((layer + 1) % 4 != 0) for layer in range(layers)]


def no_rope_every_fourth(config: Any) -> dict[str, Any]:
    """Return no keys, because llama.cpp always omits the rotary embedding in every fourth layer.

    Raises UserError if the config omits it in other layers.
    """
    if list(config.no_rope_layers) != rope_but_every_fourth(config.num_hidden_layers):
        raise cannot_compute("the layers without rotary embedding are not exactly every fourth one")
    return {}


GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Number of layers by which llama.cpp recognizes the 27B models, whose attention it scales differently."""


def gemma_scale(architecture: str) -> Callable[[Any], dict[str, Any]]:
    """Return a function that checks the attention scale of Gemma 2 or 3, which is built into llama.cpp."""

    def keys(config: Any) -> dict[str, Any]:
        is_27b = config.num_hidden_layers == GEMMA_27B[architecture]
        scaled_by = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        if config.query_pre_attn_scalar != scaled_by:
            raise cannot_compute(
                f"its attention is scaled by {config.query_pre_attn_scalar}, not {scaled_by}"
            )
        return {}

    return keys


def _first_shared_layer(config: Any) -> int:
    """Return the first layer that uses the keys and values of an earlier layer. Raises UserError."""
    first: int = config.num_hidden_layers - config.num_kv_shared_layers
    if config.layer_types[first - 2 : first] != ["sliding_attention", "full_attention"]:
        raise cannot_compute("its last layers do not share the keys and values of the two before them")
    return first


GEMMA_3N = {"altup_num_inputs": 4, "altup_active_idx": 0, "laurel_rank": 64} | {
    "hidden_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}
"""Settings of Gemma 3n that are built into llama.cpp (src/models/gemma3n.cpp, src/llama-hparams.h)."""
_SPARSE_LAYERS, _SPARSITY, _FIRST_SHARED = 10, 0.95, 20


def gemma3n(config: Any) -> dict[str, Any]:
    """Return the keys of Gemma 3n that Ollama reads. llama.cpp derives the kind of a layer from its index.

    Raises UserError if the config has other kinds of layers than llama.cpp derives.
    """
    sparsity = list(config.activation_sparsity_pattern)
    if [share == _SPARSITY for share in sparsity] != [
        layer < _SPARSE_LAYERS for layer in range(len(sparsity))
    ]:
        raise cannot_compute("its sparse layers are not exactly the first ten, with a sparsity of 95%")
    if (first := _first_shared_layer(config)) != _FIRST_SHARED:
        raise cannot_compute(f"its layers share keys and values from {first} on, not from {_FIRST_SHARED}")
    return {
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "activation_sparsity_scale": [NormalDist().inv_cdf(share) if share else 0.0 for share in sparsity],
    }


def keys_of_shared_layers(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of key and value tensors in layers that use the keys and values of an earlier layer.

    Weight files may lack these tensors.
    """
    rows = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_k": (rows, config.hidden_size),
        "attn_k_norm": (config.head_dim,),
        "attn_v": (rows, config.hidden_size),
    }
    layers = range(_FIRST_SHARED, config.num_hidden_layers)
    return {f"blk.{layer}.{name}.weight": shape for layer in layers for name, shape in shapes.items()}


def gemma4(config: Any) -> dict[str, Any]:
    """Return the keys of Gemma 4, such as head sizes, which differ between layers with and without a window.

    Raises UserError if llama.cpp computes the model differently.
    """
    if config.use_bidirectional_attention == "all":
        raise cannot_compute("a token attends to those after it")
    if getattr(config, "num_kv_shared_layers", 0):
        _first_shared_layer(config)
    full = config.per_layer_config["full_attention"].head_dim
    layers = range(config.num_hidden_layers)
    return {
        "attention.head_count_kv": [config.per_layer_config[layer].num_key_value_heads for layer in layers],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": config.head_dim,
        "embedding_length_per_layer_input": getattr(config, "hidden_size_per_layer_input", None) or 0,
    }


def sections(config: Any) -> dict[str, Any]:
    """Return how many rotary frequencies follow the position in time, in height and in width.

    In text, the three positions of a token are equal.
    """
    sections = config.rope_parameters.get("mrope_section") or [11, 11, 10]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    if sum(sections) > frequencies:  # as in the class's default for smaller heads
        sections = [(frequencies + rest) // 3 for rest in (2, 1, 0)]
    return {"rope.dimension_sections": [*sections, 0][:4]}


def recurrent(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    return sections(config) | {
        "attention.recurrent_layers": [kind == "linear_attention" for kind in kinds],
        "full_attention_interval": full[0] if full else len(kinds) + 1,
    }


def mla(config: Any) -> dict[str, Any]:
    """Return the sizes of multi-head latent attention, which llama.cpp computes with one key head."""
    rank, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + rotated,
        "attention.value_length_mla": config.v_head_dim,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rotated,
        "expert_shared_count": getattr(config, "n_shared_experts", None) or 0,
    }
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if getattr(config, "n_routed_experts", None) is None:
        keys["leading_dense_block_count"] = config.num_hidden_layers
        keys["expert_feed_forward_length"] = config.intermediate_size
    return keys


def temperature(config: Any) -> dict[str, Any]:
    """Return by how much queries grow with their position beyond the original context."""
    rope = config.rope_parameters
    if not (scale := rope.get("llama_4_scaling_beta")):
        return {}
    length = rope["original_max_position_embeddings"]
    return {"attention.temperature_scale": float(scale), "attention.temperature_length": length}


def mimo2(config: Any) -> dict[str, Any]:
    """Return MiMo 2's number of key heads per layer, and the size and scale of its values.

    Layers with a window have twice as many key heads as the others.
    """
    heads = config.num_key_value_heads
    return {
        "attention.head_count_kv": [
            2 * heads if kind == "sliding_attention" else heads for kind in config.layer_types
        ],
        "attention.value_length": config.v_head_dim,
        "attention.value_scale": float(config.attention_value_scale or 1.0),
    }


def minicpm3(config: Any) -> dict[str, Any]:
    """Return the sizes of MiniCPM 3's latent attention, which llama.cpp computes with all its heads."""
    return {
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


GATES = {"softmax": 1, "sigmoid": 2}
"""Values of ``expert_gating_func`` (llama.cpp, src/llama-hparams.h)."""


def gating(name: str) -> Callable[[Any], dict[str, Any]]:
    """Return a function that returns the key for a router that uses ``name``, softmax or sigmoid."""
    return lambda config: {"expert_gating_func": GATES[name]}


def granite_hybrid(config: Any) -> dict[str, Any]:
    """Return the key that says whether attention uses rotary embeddings. llama.cpp reads this from
    ``rope.scaling.finetuned``.
    """
    return {"rope.scaling.finetuned": getattr(config, "position_embedding_type", "rope") == "rope"}


def no_dense_layers(config: Any) -> dict[str, Any]:
    """Return no keys. Raises UserError if a layer has a feed-forward network without experts."""
    if "mlp" in config.layer_types:
        raise cannot_compute("some of its layers have no experts")
    return {}
