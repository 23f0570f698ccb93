"""DeepSeek's latent attention: keys and values rebuilt from one narrow projection."""

from __future__ import annotations

from dataclasses import replace

from qlora_tui.memory.attention import Heads, Kernel, attend
from qlora_tui.memory.autograd import Tensor
from qlora_tui.memory.linear import linear
from qlora_tui.memory.ops import FLOAT, Linear, Ops


def latent_attention(
    ops: Ops,
    linears: dict[str, Linear],
    shape: Heads,
    kernel: Kernel,
    hidden_states: Tensor,
    norm_itemsize: int,
) -> Tensor:
    """Compute the attention output before the output projection."""
    down, up = linears["kv_a_proj_with_mqa"], linears["kv_b_proj"]
    heads, tokens = shape.heads, ops.tokens
    value_dim = linears["o_proj"].inputs // heads
    rope = down.outputs - up.inputs
    query = _queries(ops, linears, hidden_states, norm_itemsize)
    head_dim = query.numel // tokens // heads
    compressed = linear(ops, hidden_states, down)
    latent = ops.rms_norm(ops.slice(compressed, tokens * up.inputs), weight=norm_itemsize)
    turned = _turned(ops, ops.slice(query, tokens * heads * rope))
    key_turned = _turned(ops, ops.slice(compressed, tokens * rope))
    del compressed
    passed = ops.slice(query, tokens * heads * (head_dim - rope))
    query = _filled(ops, tokens * heads * head_dim, passed, turned)
    del passed, turned
    both = linear(ops, latent, up)
    del latent
    key = _filled(
        ops, tokens * heads * head_dim, ops.slice(both, tokens * heads * (head_dim - rope)), key_turned
    )
    value = ops.slice(both, tokens * heads * value_dim)
    del both, key_turned
    own = replace(shape, kv_heads=heads, head_dim=head_dim, value_dim=value_dim)
    return attend(ops, query, key, value, own, kernel)


def _queries(ops: Ops, linears: dict[str, Linear], x: Tensor, norm_itemsize: int) -> Tensor:
    """Replay the query projection, or two with a norm between."""
    if "q_proj" in linears:
        return linear(ops, x, linears["q_proj"])
    narrow = ops.rms_norm(linear(ops, x, linears["q_a_proj"]), weight=norm_itemsize)
    return linear(ops, narrow, linears["q_b_proj"])


def _turned(ops: Ops, x: Tensor) -> Tensor:
    """Replay rotary positions as a product of complex numbers, in float32."""
    return ops.cast(ops.scale(ops.cast(x, FLOAT)), x.itemsize)


def _filled(ops: Ops, numel: int, *parts: Tensor) -> Tensor:
    """Replay a tensor assembled from parts; each takes a copy of its share of the gradient."""
    sizes = [(part.numel, part.itemsize) for part in parts]
    node = ops.tape.node(
        parts, lambda grad, saved: tuple(ops.new(count, itemsize) for count, itemsize in sizes)
    )
    out = ops.new(numel, parts[0].itemsize)
    out.node = node
    return out
