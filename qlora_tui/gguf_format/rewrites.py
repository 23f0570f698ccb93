"""Rules for tensors that llama.cpp stores in another form than transformers.

Conventions that many families share:

* Rotary embedding. transformers rotates row i of a head with row i + d/2 (d: rotated rows). llama.cpp does
  the same for most architectures, but rotates neighboring rows, 2i and 2i + 1, for Llama and its relatives:
  their rows of q and k are stored in that order. With d = 4, rows ``0 1 2 3`` of a head become ``0 2 1 3``.
* Norms that multiply by 1 + w in transformers multiply by the stored weight in llama.cpp.
* Experts are one tensor per projection and layer, (experts, outputs, inputs).
* The decay of a state space is stored as −exp(A_log), a depthwise convolution as (channels, kernel).

They follow llama.cpp's converter (conversion/). ``conventions`` says which architecture uses which rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Change: TypeAlias = Callable[[Tensor, Any], Tensor]
"""Returns llama.cpp's values of a tensor, given transformers' values and the config. Also works on the meta
device, to find the shape.
"""


@dataclass(frozen=True)
class Rewrite:
    """A rule for tensors with matching names: how llama.cpp stores them."""

    pattern: str
    """Regular expression that is searched for in a tensor's name."""
    into: tuple[tuple[str, Change], ...]
    """For each resulting tensor: the replacement of the matched part of the name, and the function that
    returns the values.
    """

    def names(self, name: str) -> list[str] | None:
        """Return the names of the stored tensors; None if the rule does not apply to this name."""
        if not re.search(self.pattern, name):
            return None
        return [re.sub(self.pattern, target, name) for target, _ in self.into]


def _same(values: Tensor, config: Any) -> Tensor:
    return values


def renamed(pattern: str, target: str) -> Rewrite:
    """Return a rule for tensors that are only renamed."""
    return Rewrite(pattern, ((target, _same),))


def changed(pattern: str, change: Change) -> Rewrite:
    """Return a rule for tensors whose values change and whose names stay."""
    return Rewrite(rf"(?P<whole>{pattern})", ((r"\g<whole>", change),))


def _part(number: int, of: int) -> Change:
    return lambda values, config: values.chunk(of, dim=-2)[number]


def _halves(pattern: str, first: str, second: str) -> Rewrite:
    return Rewrite(pattern, ((first, _part(0, 2)), (second, _part(1, 2))))


def permute_for_interleaved_rope(values: Tensor, heads: int, rotated: float = 1.0) -> Tensor:
    """Reorder the rows of q or k, (rows, …), for a rotary embedding of neighboring rows.

    With one head of four rows, ``0 1 2 3`` become ``0 2 1 3``. ``rotated`` is the share of a head's rows that
    rotate, starting with the first row; other rows are not moved.
    """
    by_head = values.reshape(heads, values.shape[0] // heads, *values.shape[1:])
    count = int(by_head.shape[1] * rotated)
    halves = by_head[:, :count].reshape(heads, 2, count // 2, *values.shape[1:])
    pairs = halves.transpose(1, 2).reshape(heads, count, *values.shape[1:])
    return torch.cat([pairs, by_head[:, count:]], dim=1).reshape(values.shape)


def _pairs(heads: str) -> Change:
    """Return a function that reorders rows of a projection whose number of heads is the setting ``heads``."""

    def change(values: Tensor, config: Any) -> Tensor:
        share = (config.rope_parameters or {}).get("partial_rotary_factor") or 1.0
        return permute_for_interleaved_rope(values, getattr(config, heads), share)

    return change


EVERYWHERE = (
    _halves(r"experts\.gate_up_proj$", "experts.gate_proj.weight", "experts.up_proj.weight"),
    renamed(r"experts\.(down|up)_proj$", r"experts.\1_proj.weight"),
    renamed(r"mixer\.experts\.", "mlp.experts."),
    _halves(r"block_sparse_moe\.input_linear\.", "mlp.experts.gate_proj.", "mlp.experts.up_proj."),
    renamed(r"block_sparse_moe\.output_linear\.", "mlp.experts.down_proj."),
    changed(r"\.A_log$", lambda values, config: -values.float().exp()),
    changed(r"conv(1d|\.conv)\.weight$", lambda values, config: values.squeeze(1)),
)
"""Rules of all architectures. Rules of a single architecture precede them."""

PAIRS = (
    changed(r"\.q_proj\.(weight|bias)$", _pairs("num_attention_heads")),
    changed(r"\.k_proj\.(weight|bias)$", _pairs("num_key_value_heads")),
)
"""Rules of architectures whose rotary embedding rotates neighboring rows."""


def _offset(pattern: str) -> Rewrite:
    return changed(pattern, lambda values, config: values.float() + 1)


GEMMA = (_offset(r"norm\.weight$"),)


def _by_groups(values: Tensor, config: Any) -> Tensor:
    groups = getattr(config, "mamba_n_groups", None) or config.n_groups
    return values.reshape(groups, -1)


MAMBA2 = (
    changed(r"\.(A_log|D)$", lambda values, config: values[:, None]),
    changed(r"(mamba|mixer)\.norm\.weight$", _by_groups),
)
"""Rules of state-space layers of the second kind (Mamba 2)."""


def _tiled(values: Tensor, config: Any, size: int, dim: int = 0, start: int = 0) -> Tensor:
    """Reorder the value heads of linear attention, of ``size`` rows each, to match llama.cpp's key heads.

    transformers stores the value heads of one key head next to each other, but llama.cpp repeats all key
    heads one after another. ``dim`` is the dimension with the heads, which begin at ``start``.
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

QWEN35 = (
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
    """Return a function that selects every second output of all experts from (experts, inputs, outputs)."""
    return lambda values, config: values.transpose(1, 2)[:, first::2]


GPT_OSS = (
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

TRANSPOSED_EXPERTS = (
    Rewrite(
        r"experts\.gate_up_proj$",
        (
            ("experts.gate_proj.weight", lambda v, config: v.transpose(1, 2).chunk(2, dim=1)[0]),
            ("experts.up_proj.weight", lambda v, config: v.transpose(1, 2).chunk(2, dim=1)[1]),
        ),
    ),
    Rewrite(r"experts\.down_proj$", (("experts.down_proj.weight", lambda v, config: v.transpose(1, 2)),)),
)


INPUTS_FIRST = (
    changed(
        r"experts\.gate_up_proj$",
        lambda values, config: values if values.shape[1] == 2 * config.moe_intermediate_size else values.mT,
    ),
    changed(
        r"experts\.down_proj$",
        lambda values, config: values if values.shape[2] == config.moe_intermediate_size else values.mT,
    ),
)
"""Rules for experts that published files store as (experts, inputs, outputs). Files that transformers saved
have the layout that it uses in memory, (experts, outputs, inputs).
"""


def _times(pattern: str, factor: Callable[[Any], float]) -> Rewrite:
    return changed(pattern, lambda values, config: values.float() * factor(config))


def _ssm_in(values: Tensor, config: Any) -> Tensor:
    """Multiply the five parts of a state-space layer's input projection by their factors."""
    inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
    sizes = torch.tensor([inner, inner, states, states, config.mamba_n_heads])
    factors = torch.tensor(config.ssm_multipliers).repeat_interleave(sizes) * config.ssm_in_multiplier
    scaled: Tensor = values.float() * factors[:, None].to(values.device)
    return scaled


FALCON_H1 = (
    *MAMBA2,
    _times(r"feed_forward\.gate_proj\.weight$", lambda config: config.mlp_multipliers[0]),
    _times(r"feed_forward\.down_proj\.weight$", lambda config: config.mlp_multipliers[1]),
    _times(r"k_proj\.weight$", lambda config: config.key_multiplier * config.attention_in_multiplier),
    _times(r"[qv]_proj\.weight$", lambda config: config.attention_in_multiplier),
    _times(r"o_proj\.weight$", lambda config: config.attention_out_multiplier),
    _times(r"mamba\.out_proj\.weight$", lambda config: config.ssm_out_multiplier),
    changed(r"mamba\.in_proj\.weight$", _ssm_in),
    _times(r"lm_head\.weight$", lambda config: config.lm_head_multiplier),
    _times(r"embed_tokens\.weight$", lambda config: config.embedding_multiplier),
)

GEMMA4 = (
    renamed(r"experts\.gate_up_proj$", "experts.gate_up_proj.weight"),
    renamed(r"model\.layers\.(\d+)\.router\.scale$", r"blk.\1.ffn_gate_inp.scale"),
    renamed(r"model\.layers\.(\d+)\.router\.per_expert_scale$", r"blk.\1.ffn_down_exps.scale"),
)


def _with_every_token(values: Tensor, config: Any) -> Tensor:
    """Append a copy of token 0's row for each image and audio token, because transformers uses that row for
    them.
    """
    missing = config.vocab_size - values.shape[0]
    return torch.cat([values, values[:1].expand(missing, -1)]) if missing > 0 else values


GEMMA3N = (changed(r"embed_tokens_per_layer\.weight$", _with_every_token),)


def _of_each_head(part: int) -> Change:
    """Return a function that takes each head's key (0) or value part (1) of latent attention."""

    def change(values: Tensor, config: Any) -> Tensor:
        heads = values.reshape(config.num_attention_heads, -1, values.shape[-1])
        keys = config.qk_nope_head_dim
        return heads[:, :keys].transpose(1, 2) if part == 0 else heads[:, keys:]

    return change


MLA = (
    Rewrite(
        r"kv_b_proj\.weight$", (("k_b_proj.weight", _of_each_head(0)), ("v_b_proj.weight", _of_each_head(1)))
    ),
)


def _heads_apart(values: Tensor, config: Any) -> Tensor:
    """Reorder rows that are grouped by head: all rows of q first, then those of k, then those of v."""
    heads = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
    return heads.transpose(0, 1).reshape(values.shape)


def falcon_key_heads(config: Any) -> int:
    """Return the number of key heads of a Falcon model. Its config can contain a number that is not used."""
    many: int = config.num_kv_heads
    return many if config.new_decoder_architecture or not config.multi_query else 1


def _groups_apart(values: Tensor, config: Any) -> Tensor:
    """Reorder rows that are grouped by key head: all rows of q first, then those of k, then those of v."""
    keys, size = falcon_key_heads(config), config.hidden_size // config.num_attention_heads
    groups = values.reshape(keys, -1, size, *values.shape[1:])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, *values.shape[1:]) for part in parts])


NEOX = (changed(r"query_key_value\.(weight|bias)$", _heads_apart),)

SHARED = (
    _halves(r"shared_mlp\.input_linear\.", "mlp.shared_expert.gate_proj.", "mlp.shared_expert.up_proj."),
)

ALONE = (
    _halves(r"shared_mlp\.input_linear\.", "mlp.gate_proj.", "mlp.up_proj."),
    renamed(r"shared_mlp\.output_linear\.", "mlp.down_proj."),
)

GPT2 = (changed(r"c_(attn|proj|fc)\.weight$", lambda values, config: values.T),)
FALCON = (changed(r"query_key_value\.(weight|bias)$", _groups_apart),)
QWEN3_NEXT = (_QWEN_NORMS,)
SINKS = (renamed(r"attention_sink_bias$", "sinks"),)
