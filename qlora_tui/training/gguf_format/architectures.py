"""llama.cpp's architecture for each model type, and how its tensors differ from those of transformers' class.

Names of tensors come from the tables of the ``gguf`` package. What is declared here is what no table says: a
permutation, an offset, a tensor that is stored in parts. How each architecture is computed: llama.cpp,
src/models; how its converter writes each: conversion/.

transformers and llama.cpp differ in conventions that many families share:

* Rotary embedding. transformers rotates row i of a head with row i + d/2 (d: rotated rows). llama.cpp does
  the same for most architectures, but rotates neighboring rows, 2i and 2i + 1, for Llama and its relatives:
  their rows of q and k are stored in that order. With d = 4, rows ``0 1 2 3`` of a head become ``0 2 1 3``.
* Norms that multiply by 1 + w in transformers multiply by the stored weight in llama.cpp.
* Experts are one tensor per projection and layer, (experts, outputs, inputs).
* The decay of a state space is stored as −exp(A_log), a depthwise convolution as (channels, kernel).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from qlora_tui.errors import UserError

Change: TypeAlias = Callable[[Tensor, Any], Tensor]
"""Returns llama.cpp's values of a tensor, from transformers' and the text config. Also for a meta tensor."""


@dataclass(frozen=True)
class Rewrite:
    """How llama.cpp stores the tensors whose names match."""

    pattern: str
    """Regular expression that is searched in the name in the weight files."""
    into: tuple[tuple[str, Change], ...]
    """For each tensor of the GGUF file, what replaces the matched part of the name, and its values."""

    def names(self, name: str) -> list[str] | None:
        """Return the names of the tensors that are stored; None if the rule is not for this tensor."""
        if not re.search(self.pattern, name):
            return None
        return [re.sub(self.pattern, target, name) for target, _ in self.into]


def _same(values: Tensor, config: Any) -> Tensor:
    return values


def renamed(pattern: str, target: str) -> Rewrite:
    """Return the rule of tensors that only have another name."""
    return Rewrite(pattern, ((target, _same),))


def changed(pattern: str, change: Change) -> Rewrite:
    """Return the rule of tensors that only have other values."""
    return Rewrite(rf"(?P<whole>{pattern})", ((r"\g<whole>", change),))


def _part(number: int, of: int) -> Change:
    return lambda values, config: values.chunk(of, dim=-2)[number]


def _halves(pattern: str, first: str, second: str) -> Rewrite:
    return Rewrite(pattern, ((first, _part(0, 2)), (second, _part(1, 2))))


def permute_for_interleaved_rope(values: Tensor, heads: int) -> Tensor:
    """Order the rows of q or k, (rows, …), for a rotary embedding of neighboring rows.

    With one head of four rows, ``0 1 2 3`` become ``0 2 1 3``.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


EVERYWHERE = (
    _halves(r"experts\.gate_up_proj$", "experts.gate_proj.weight", "experts.up_proj.weight"),
    renamed(r"experts\.(down|up)_proj$", r"experts.\1_proj.weight"),
    renamed(r"mixer\.experts\.", "mlp.experts."),
    _halves(r"block_sparse_moe\.input_linear\.", "mlp.experts.gate_proj.", "mlp.experts.up_proj."),
    renamed(r"block_sparse_moe\.output_linear\.", "mlp.experts.down_proj."),
    changed(r"\.A_log$", lambda values, config: -values.float().exp()),
    changed(r"conv(1d|\.conv)\.weight$", lambda values, config: values.squeeze(1)),
)
"""Rules of all architectures; those of an architecture come before them."""

_PAIRS = (
    changed(
        r"\.q_proj\.(weight|bias)$",
        lambda values, config: permute_for_interleaved_rope(values, config.num_attention_heads),
    ),
    changed(
        r"\.k_proj\.(weight|bias)$",
        lambda values, config: permute_for_interleaved_rope(values, config.num_key_value_heads),
    ),
)
"""For architectures whose rotary embedding rotates neighboring rows."""


def _offset(pattern: str) -> Rewrite:
    return changed(pattern, lambda values, config: values.float() + 1)


_GEMMA = (_offset(r"norm\.weight$"),)


def _by_groups(values: Tensor, config: Any) -> Tensor:
    groups = getattr(config, "mamba_n_groups", None) or config.n_groups
    return values.reshape(groups, -1)


_MAMBA2 = (
    changed(r"\.(A_log|D)$", lambda values, config: values[:, None]),
    changed(r"(mamba|mixer)\.norm\.weight$", _by_groups),
)
"""State-space layers of the second kind (Mamba 2)."""


def _tiled(values: Tensor, config: Any, size: int, dim: int = 0, start: int = 0) -> Tensor:
    """Order the value heads of linear attention, of ``size`` rows each, as llama.cpp repeats key heads.

    transformers stores the value heads of one key head next to each other; llama.cpp repeats all key heads
    one after another. ``dim`` is the dimension with the heads, which begin at ``start``.
    """
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    order = torch.arange(heads * size, device=values.device)
    order = order.reshape(keys, heads // keys, size).transpose(0, 1).flatten() + start
    if start:
        order = torch.cat([torch.arange(start, device=values.device), order])
    return values.index_select(dim, order)


def _tiled_qkv(values: Tensor, config: Any) -> Tensor:
    start = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return _tiled(values, config, config.linear_value_head_dim, start=start)


_QWEN_NORMS = _offset(r"(?<!linear_attn\.)norm\.weight$")
_QWEN35 = (
    _QWEN_NORMS,
    changed(
        r"linear_attn\.(A_log|dt_bias|in_proj_[ab]\.weight)$",
        lambda values, config: _tiled(values, config, 1),
    ),
    changed(
        r"linear_attn\.in_proj_z\.weight$",
        lambda values, config: _tiled(values, config, config.linear_value_head_dim),
    ),
    changed(r"linear_attn\.(in_proj_qkv|conv1d)\.weight$", _tiled_qkv),
    changed(
        r"linear_attn\.out_proj\.weight$",
        lambda values, config: _tiled(values, config, config.linear_value_head_dim, 1),
    ),
)


def _every_second(first: int) -> Change:
    """Return every second output of all experts, which are stored as (experts, inputs, outputs)."""
    return lambda values, config: values.transpose(1, 2)[:, first::2]


_GPT_OSS = (
    Rewrite(
        r"experts\.gate_up_proj$",
        (("experts.gate_proj.weight", _every_second(0)), ("experts.up_proj.weight", _every_second(1))),
    ),
    Rewrite(
        r"experts\.gate_up_proj_bias$",
        (
            ("experts.gate_proj.bias", lambda values, config: values[..., ::2]),
            ("experts.up_proj.bias", lambda values, config: values[..., 1::2]),
        ),
    ),
    Rewrite(
        r"experts\.down_proj$", (("experts.down_proj.weight", lambda values, config: values.transpose(1, 2)),)
    ),
)


_TRANSPOSED_EXPERTS = (
    Rewrite(
        r"experts\.gate_up_proj$",
        (
            ("experts.gate_proj.weight", lambda v, config: v.transpose(1, 2).chunk(2, dim=1)[0]),
            ("experts.up_proj.weight", lambda v, config: v.transpose(1, 2).chunk(2, dim=1)[1]),
        ),
    ),
    Rewrite(r"experts\.down_proj$", (("experts.down_proj.weight", lambda v, config: v.transpose(1, 2)),)),
)


def _times(pattern: str, factor: Callable[[Any], float]) -> Rewrite:
    return changed(pattern, lambda values, config: values.float() * factor(config))


def _ssm_in(values: Tensor, config: Any) -> Tensor:
    """Multiply the five parts of a state space's input by their factors."""
    inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
    sizes = torch.tensor([inner, inner, states, states, config.mamba_n_heads])
    factors = torch.tensor(config.ssm_multipliers).repeat_interleave(sizes) * config.ssm_in_multiplier
    scaled: Tensor = values.float() * factors[:, None].to(values.device)
    return scaled


_FALCON_H1 = (
    *_MAMBA2,
    _times(r"mlp\.gate_proj\.weight$", lambda config: config.mlp_multipliers[0]),
    _times(r"(feed_forward|mlp)\.down_proj\.weight$", lambda config: config.mlp_multipliers[1]),
    _times(r"feed_forward\.gate_proj\.weight$", lambda config: config.mlp_multipliers[0]),
    _times(r"k_proj\.weight$", lambda config: config.key_multiplier * config.attention_in_multiplier),
    _times(r"[qv]_proj\.weight$", lambda config: config.attention_in_multiplier),
    _times(r"o_proj\.weight$", lambda config: config.attention_out_multiplier),
    _times(r"mamba\.out_proj\.weight$", lambda config: config.ssm_out_multiplier),
    changed(r"mamba\.in_proj\.weight$", _ssm_in),
    _times(r"lm_head\.weight$", lambda config: config.lm_head_multiplier),
    _times(r"embed_tokens\.weight$", lambda config: config.embedding_multiplier),
)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What one of llama.cpp's architectures has of its own."""

    architecture: str
    """``general.architecture``."""
    types: tuple[str, ...] = ()
    """transformers' model types, if not only the one that is spelled like the architecture."""
    when: Callable[[Any], bool] = lambda config: True
    """Whether it is the one for a config of these types."""
    rewrites: tuple[Rewrite, ...] = ()
    reads: frozenset[str] = frozenset()
    """Constants that it reads besides those that every architecture reads."""
    folded: frozenset[str] = frozenset()
    """Settings of the config that ``rewrites`` or ``keys`` account for."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it has no key for, with the value it computes with, where that of the class is another
    one or is not looked at."""
    windows: bool = False
    """Whether it computes sliding windows."""
    kv_by_layer: bool = False
    """Whether it recognizes layers without attention by their number of key heads, which is 0."""
    dense_layers: Literal["", "first", "any"] = ""
    """Which layers of a mixture may have no experts."""
    yarn_multiplier: float = 0.0
    """What ``mscale_all_dim`` is multiplied by in ``yarn_log_multiplier``; 0 if it does not read that."""
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Constants that are not a setting as it stands; may raise UserError."""
    scalars: Mapping[str, str] = field(default_factory=dict)
    """Ends of names of tensors that hold one number in each layer, with the key that has all of them."""


def cannot_compute(why: str) -> UserError:
    """Return the error of a model that llama.cpp would compute otherwise."""
    return UserError(
        "This model cannot be exported as GGUF",
        what=f"llama.cpp cannot compute it: {why}.",
        fix="Export it with `qlora-tui export merge`; transformers and vLLM can load that folder.",
    )


def _no_rope_every_fourth(config: Any) -> dict[str, Any]:
    usual = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != usual:
        raise cannot_compute("the layers without rotary embedding are not exactly every fourth one")
    return {}


_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Number of layers by which llama.cpp recognizes the 27B, whose attention it scales otherwise."""


def _gemma_scale(architecture: str) -> Callable[[Any], dict[str, Any]]:
    def keys(config: Any) -> dict[str, Any]:
        is_27b = config.num_hidden_layers == _GEMMA_27B[architecture]
        scaled_by = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        if config.query_pre_attn_scalar != scaled_by:
            raise cannot_compute(
                f"its attention is scaled by {config.query_pre_attn_scalar}, not {scaled_by}"
            )
        return {}

    return keys


_GEMMA4 = (
    renamed(r"experts\.gate_up_proj$", "experts.gate_up_proj.weight"),
    renamed(r"model\.layers\.(\d+)\.router\.scale$", r"blk.\1.ffn_gate_inp.scale"),
    renamed(r"model\.layers\.(\d+)\.router\.per_expert_scale$", r"blk.\1.ffn_down_exps.scale"),
)


def _gemma4(config: Any) -> dict[str, Any]:
    """Return the sizes of heads, which differ between layers with a window and those without one."""
    if config.use_bidirectional_attention == "all":
        raise cannot_compute("a token attends to those after it")
    if getattr(config, "num_kv_shared_layers", 0):
        first = config.num_hidden_layers - config.num_kv_shared_layers
        if config.layer_types[first - 2 : first] != ["sliding_attention", "full_attention"]:
            raise cannot_compute("its last layers do not share the keys and values of the two before them")
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


def _sections(config: Any) -> dict[str, Any]:
    """Return how many frequencies rotate by time, height and width, which are one position in a text."""
    sections = config.rope_parameters.get("mrope_section") or [11, 11, 10]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    if sum(sections) > frequencies:  # as in the class's default for smaller heads
        sections = [(frequencies + rest) // 3 for rest in (2, 1, 0)]
    return {"rope.dimension_sections": [*sections, 0][:4]}


def _recurrent(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    return _sections(config) | {
        "attention.recurrent_layers": [kind == "linear_attention" for kind in kinds],
        "full_attention_interval": full[0] if full else len(kinds) + 1,
    }


def _of_each_head(part: int) -> Change:
    """Return the key (0) or value part (1) of each head of latent attention's second projection."""

    def change(values: Tensor, config: Any) -> Tensor:
        heads = values.reshape(config.num_attention_heads, -1, values.shape[-1])
        keys = config.qk_nope_head_dim
        return heads[:, :keys].transpose(1, 2) if part == 0 else heads[:, keys:]

    return change


_MLA = (
    Rewrite(
        r"kv_b_proj\.weight$", (("k_b_proj.weight", _of_each_head(0)), ("v_b_proj.weight", _of_each_head(1)))
    ),
)


def _mla(config: Any) -> dict[str, Any]:
    """Return the sizes of latent attention, which llama.cpp computes with one key head."""
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


def _heads_apart(values: Tensor, config: Any) -> Tensor:
    """Return the rows of q, k and v after each other, which each head has next to each other."""
    heads = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
    return heads.transpose(0, 1).reshape(values.shape)


def _falcon_key_heads(config: Any) -> int:
    many: int = config.num_kv_heads
    return many if config.new_decoder_architecture or not config.multi_query else 1


def _groups_apart(values: Tensor, config: Any) -> Tensor:
    """Return the rows of q, k and v after each other, which each key head has next to each other."""
    keys, size = _falcon_key_heads(config), config.hidden_size // config.num_attention_heads
    groups = values.reshape(keys, -1, size, *values.shape[1:])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, *values.shape[1:]) for part in parts])


def _transposed(pattern: str) -> Rewrite:
    return changed(pattern, lambda values, config: values.T)


_NEOX = (changed(r"query_key_value\.(weight|bias)$", _heads_apart),)


def _gating(name: str) -> Callable[[Any], dict[str, Any]]:
    number = {"softmax": 1, "sigmoid": 2}[name]
    return lambda config: {"expert_gating_func": number}


def _has(kind: str) -> Callable[[Any], bool]:
    return lambda config: kind in (getattr(config, "layer_types", None) or ())


_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
_ROUTING = frozenset({"expert_weights_scale", "expert_weights_norm"})
_GROUPS = frozenset({"expert_group_count", "expert_group_used_count"})
_EXAONE_32B = 64
"""Number of layers by which llama.cpp recognizes the one with windows, whose other layers do not rotate."""
_EXPERTS_EVERYWHERE = {"mlp_only_layers": [], "decoder_sparse_step": 1}
_SHARED = (
    _halves(r"shared_mlp\.input_linear\.", "mlp.shared_expert.gate_proj.", "mlp.shared_expert.up_proj."),
)
_ALONE = (
    _halves(r"shared_mlp\.input_linear\.", "mlp.gate_proj.", "mlp.up_proj."),
    renamed(r"shared_mlp\.output_linear\.", "mlp.down_proj."),
)


def _granite_hybrid(config: Any) -> dict[str, Any]:
    return {"rope.scaling.finetuned": getattr(config, "position_embedding_type", "rope") == "rope"}


def _no_dense_layers(config: Any) -> dict[str, Any]:
    if "mlp" in config.layer_types:
        raise cannot_compute("some of its layers have no experts")
    return {}


def _is_mixture(config: Any) -> bool:
    return bool(getattr(config, "num_local_experts", 0))


_MAMBA_SETTINGS = frozenset(
    {
        "attn_layer_indices",
        "mamba_expand",
        "mamba_chunk_size",
        "mamba_d_head",
        "mamba_d_ssm",
        "position_embedding_type",
    }
)

CONVENTIONS: tuple[Convention, ...] = (
    Convention(architecture="llama", types=("llama", "mistral", "mixtral"), rewrites=_PAIRS),
    Convention(architecture="arcee", rewrites=_PAIRS),
    Convention(
        architecture="smollm3",
        rewrites=_PAIRS,
        folded=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        keys=_no_rope_every_fourth,
    ),
    Convention(
        architecture="mistral3",
        types=("ministral3",),
        rewrites=_PAIRS,
        yarn_multiplier=1.0,
        keys=lambda config: {
            "attention.temperature_scale": float(config.rope_parameters.get("llama_4_scaling_beta") or 0.0)
        },
    ),
    Convention(
        architecture="granitehybrid",
        types=("granitemoehybrid",),
        when=lambda config: _has("linear_attention")(config) and _is_mixture(config),
        rewrites=(*_SHARED, *_PAIRS, *_MAMBA2),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
        kv_by_layer=True,
        keys=_granite_hybrid,
    ),
    Convention(
        architecture="granitehybrid",
        types=("granitemoehybrid",),
        when=_has("linear_attention"),
        rewrites=(*_ALONE, *_PAIRS, *_MAMBA2),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
        kv_by_layer=True,
        keys=_granite_hybrid,
    ),
    Convention(
        architecture="granitemoe",
        types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        when=_is_mixture,
        rewrites=(*_SHARED, *_PAIRS),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
    ),
    Convention(
        architecture="granite",
        types=("granite", "granitemoehybrid"),
        rewrites=(*_ALONE, *_PAIRS),
        reads=_SCALES,
        folded=_MAMBA_SETTINGS,
    ),
    Convention(architecture="qwen2"),
    Convention(architecture="qwen3"),
    Convention(architecture="qwen2moe", fixed=_EXPERTS_EVERYWHERE),
    Convention(architecture="qwen3moe", fixed=_EXPERTS_EVERYWHERE | {"norm_topk_prob": True}),
    Convention(architecture="qwen3next", rewrites=(_QWEN_NORMS,), fixed=_EXPERTS_EVERYWHERE, keys=_recurrent),
    Convention(architecture="qwen35", rewrites=_QWEN35, keys=_recurrent),
    Convention(architecture="qwen35moe", rewrites=_QWEN35, keys=_recurrent),
    Convention(architecture="gemma", rewrites=_GEMMA),
    Convention(
        architecture="gemma2",
        rewrites=_GEMMA,
        reads=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
        folded=frozenset({"query_pre_attn_scalar"}),
        windows=True,
        keys=_gemma_scale("gemma2"),
    ),
    Convention(
        architecture="gemma3",
        rewrites=_GEMMA,
        reads=frozenset({"final_logit_softcapping"}),
        folded=frozenset({"query_pre_attn_scalar"}),
        windows=True,
        keys=_gemma_scale("gemma3"),
    ),
    Convention(
        architecture="gemma4",
        types=("gemma4", "gemma4_unified"),
        rewrites=_GEMMA4,
        reads=frozenset({"final_logit_softcapping", "attention.shared_kv_layers"}),
        folded=frozenset(
            {
                "use_double_wide_mlp",
                "per_layer_config",
                "enable_moe_block",
                "attention_k_eq_v",
                "use_bidirectional_attention",
            }
        ),
        windows=True,
        keys=_gemma4,
    ),
    Convention(architecture="phi3", keys=lambda config: {"attention.sliding_window": 0}),
    Convention(architecture="olmo2", types=("olmo2", "olmo3"), windows=True),
    Convention(
        architecture="olmo",
        rewrites=_PAIRS,
        reads=frozenset({"attention.clamp_kqv"}),
        keys=lambda config: {"attention.layer_norm_epsilon": 1e-5},
    ),
    Convention(architecture="olmoe"),
    Convention(architecture="chatglm", types=("glm",)),
    Convention(architecture="glm4", types=("glm4", "glm4v", "glm_ocr")),
    Convention(
        architecture="glm4moe",
        types=("glm4_moe", "glm4v_moe", "solar_open"),
        reads=_ROUTING | _GROUPS,
        folded=frozenset({"use_qk_norm"}),
        dense_layers="first",
        keys=_gating("sigmoid"),
    ),
    Convention(
        architecture="deepseek2",
        types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"),
        rewrites=_MLA,
        reads=_ROUTING | _GROUPS,
        folded=frozenset({"topk_method"}),
        yarn_multiplier=0.1,
        dense_layers="first",
        keys=lambda config: (
            _mla(config) | _gating("softmax" if config.model_type == "deepseek_v2" else "sigmoid")(config)
        ),
    ),
    Convention(architecture="seed_oss"),
    Convention(
        architecture="apertus",
        scalars={f".mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    Convention(architecture="ernie4_5"),
    Convention(
        architecture="ernie4_5-moe",
        dense_layers="first",
        keys=lambda config: {"interleave_moe_layer_step": config.moe_layer_interval},
    ),
    Convention(architecture="gpt-oss", rewrites=_GPT_OSS, windows=True),
    Convention(
        architecture="lfm2",
        folded=frozenset(
            {"block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "conv_L_cache"}
        ),
        kv_by_layer=True,
    ),
    Convention(
        architecture="lfm2moe",
        folded=frozenset({"use_expert_bias", "conv_L_cache"}),
        fixed={"norm_topk_prob": True},
        kv_by_layer=True,
        dense_layers="first",
        keys=_gating("sigmoid"),
    ),
    Convention(
        architecture="falcon-h1",
        rewrites=_FALCON_H1,
        folded=_MAMBA_SETTINGS
        | {
            "lm_head_multiplier",
            "embedding_multiplier",
            "mlp_multipliers",
            "key_multiplier",
            "attention_out_multiplier",
            "attention_in_multiplier",
            "ssm_multipliers",
            "ssm_in_multiplier",
            "ssm_out_multiplier",
            "num_logits_to_keep",
        },
    ),
    Convention(
        architecture="nemotron_h_moe",
        types=("nemotron_h",),
        when=_has("moe"),
        rewrites=_MAMBA2,
        reads=_ROUTING,
        folded=frozenset({"expand", "chunk_size", "mtp_layers_block_type"}),
        kv_by_layer=True,
        dense_layers="any",
        keys=_no_dense_layers,
    ),
    Convention(
        architecture="nemotron_h",
        rewrites=_MAMBA2,
        folded=frozenset({"expand", "chunk_size", "mtp_layers_block_type", "norm_topk_prob"}),
        kv_by_layer=True,
    ),
    Convention(architecture="command-r", types=("cohere",), reads=frozenset({"logit_scale"})),
    Convention(architecture="cohere2", reads=frozenset({"logit_scale"}), windows=True),
    Convention(architecture="starcoder2"),
    Convention(architecture="stablelm", folded=frozenset({"use_parallel_residual"})),
    Convention(architecture="nemotron", rewrites=(_offset(r"norm\.weight$"),)),
    Convention(architecture="phi2", types=("phi",)),
    Convention(
        architecture="gptneox",
        types=("gpt_neox",),
        rewrites=_NEOX,
        reads=frozenset({"use_parallel_residual"}),
    ),
    Convention(architecture="hunyuan-dense", types=("hunyuan_v1_dense",)),
    Convention(architecture="qwen2vl", types=("qwen2_vl", "qwen2_5_vl"), keys=_sections),
    Convention(architecture="qwen3vl", keys=_sections),
    Convention(
        architecture="afmoe",
        reads=frozenset({"expert_weights_scale"}),
        fixed={"mup_enabled": True},
        windows=True,
        dense_layers="first",
        keys=lambda config: _gating("sigmoid")(config) | {"expert_weights_norm": True},
    ),
    Convention(
        architecture="exaone4",
        types=("exaone4", "exaone4_5"),
        when=lambda config: config.num_hidden_layers == _EXAONE_32B,
        windows=True,
    ),
    Convention(architecture="exaone4", types=("exaone4", "exaone4_5"), fixed={"sliding_window": None}),
    Convention(architecture="jais2"),
    Convention(architecture="gpt2", rewrites=(_transposed(r"c_(attn|proj|fc)\.weight$"),)),
    Convention(
        architecture="falcon",
        rewrites=(changed(r"query_key_value\.(weight|bias)$", _groups_apart),),
        folded=frozenset({"multi_query"}),
        keys=lambda config: {"attention.head_count_kv": _falcon_key_heads(config)},
    ),
    Convention(architecture="starcoder", types=("gpt_bigcode",)),
    Convention(
        architecture="mamba2",
        rewrites=_MAMBA2,
        folded=frozenset({"expand", "chunk_size"}),
    ),
    Convention(
        architecture="llama4",
        rewrites=_TRANSPOSED_EXPERTS,
        fixed={"attention_chunk_size": 8192},
        dense_layers="any",
        folded=frozenset(
            {"no_rope_layers", "no_rope_layer_interval", "moe_layers", "interleave_moe_layer_step"}
        ),
        keys=lambda config: (
            _no_rope_every_fourth(config) | {"interleave_moe_layer_step": config.interleave_moe_layer_step}
        ),
    ),
    Convention(architecture="hunyuan-moe", types=("hunyuan_v1_moe",)),
    Convention(architecture="minimax-m2", keys=_gating("sigmoid")),
    Convention(architecture="dots1", reads=_ROUTING, dense_layers="first", keys=_gating("sigmoid")),
)


def convention_of(config: Any) -> Convention:
    """Return how llama.cpp stores a model, from its text config. Raises UserError if it is not supported."""
    model_type = config.model_type.removesuffix("_text")
    for convention in CONVENTIONS:
        named = model_type in convention.types or (
            not convention.types and _plain(model_type) == _plain(convention.architecture)
        )
        if named and convention.when(config):
            return convention
    raise _unsupported(model_type)


def _unsupported(model_type: str) -> UserError:
    import gguf

    known = next(
        (name for name in gguf.MODEL_ARCH_NAMES.values() if _plain(name) == _plain(model_type)), None
    )
    return UserError(
        "This model cannot be exported as GGUF",
        what=f"It is a {model_type}. llama.cpp computes that as {known}, which this version cannot write."
        if known
        else f"It is a {model_type}, and llama.cpp has no architecture of that name.",
        fix="Export it with `qlora-tui export merge`; transformers and vLLM can load that folder"
        + (", and llama.cpp's convert_hf_to_gguf.py converts it." if known else "."),
    )


def _plain(name: str) -> str:
    return re.sub(r"[_\-]", "", name)
