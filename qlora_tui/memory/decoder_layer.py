"""One decoder layer of each family, following its ``forward`` in transformers.

A :class:`DecoderLayer` describes the structure of a family's layer; :func:`run_block` replays it on a tape.
The names and lifetimes of the variables follow the library's, because they decide when a tensor is freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory import cohere, fused_lora
from qlora_tui.memory.attention import Heads, Kernel, attend, repeated
from qlora_tui.memory.autograd import Tensor
from qlora_tui.memory.linear import group, linear, uses_fused_lora
from qlora_tui.memory.mixture import Mixture
from qlora_tui.memory.mla import latent_attention
from qlora_tui.memory.moe import mixture, weighted
from qlora_tui.memory.ops import Linear, Ops

TRITON_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Activations that the Triton kernel of a gated MLP has, under their names in configs."""


@dataclass(frozen=True)
class DecoderLayer:
    """Structure of one layer."""

    linears: tuple[Linear, ...]
    heads: Heads
    norm: Literal["rms", "float", "layer", "cohere"]
    """float: an RMSNorm that multiplies by its weight in float32 (Gemma, OLMo-2). cohere: a LayerNorm written
    out in float32, and rotary positions in float32 too."""
    order: Literal["pre", "parallel", "sandwich", "post"]
    """pre: norm before each half. parallel: both halves read the layer's input, normalized. sandwich: norms
    on both sides of each half (Gemma 2 and 3). post: norms after each half (OLMo-2)."""
    two_norms: bool
    """Whether parallel halves have a norm each (GPT-NeoX) or share one (Phi-2)."""
    activation: str
    gated: bool
    intermediate: int
    hidden: int
    norm_itemsize: int
    """Bytes per element of the norms' weights."""
    kernel: Kernel
    rotary: float = 1.0
    """Share of each head that rotates; 0 without rotary positions."""
    rotates_halves: bool = True
    """Whether rotary positions pair the halves of a head, as our kernel does, not even and odd columns."""
    head_norms: Literal["no", "head", "full"] = "no"
    """RMSNorm on queries and keys: per head (Qwen3, Gemma 3) or over the full width (OLMo-2)."""
    residual_scale: bool = False
    """Whether each half is multiplied by a number before it is added (Granite)."""
    keeps_attention_output: bool = False
    """Whether ``forward()`` keeps the attention output alive until it returns (StableLM)."""
    mixture: Mixture | None = None
    """Routed experts instead of the MLP."""
    dropout: float = 0.0
    """Rate of the base model's own dropout on the output of each half."""

    def find(self, part: str, *names: str) -> Linear | None:
        """Return the module with one of these names in one part of the layer."""
        for module in self.linears:
            if module.part == part and module.name in names:
                return module
        return None


def run_block(ops: Ops, block: DecoderLayer, hidden_states: Tensor) -> Tensor:
    """Replay the layer's forward; return its output."""
    try:
        return _run(ops, block, hidden_states)
    finally:
        ops.returned_extra = None


def _run(ops: Ops, block: DecoderLayer, hidden_states: Tensor) -> Tensor:
    if block.order == "parallel":
        return _parallel(ops, block, hidden_states)
    residual = hidden_states
    if block.order != "post":
        hidden_states = norm(ops, block, hidden_states)
    hidden_states = _attention(ops, block, hidden_states)
    hidden_states = ops.dropout_residual(hidden_states, block.dropout)
    if block.order in ("post", "sandwich"):
        hidden_states = norm(ops, block, hidden_states)
    held = hidden_states if block.keeps_attention_output else None
    hidden_states = _add(ops, block, residual, hidden_states)
    residual = hidden_states
    if block.order != "post":
        hidden_states = norm(ops, block, hidden_states)
    hidden_states = _feed_forward(ops, block, hidden_states)
    hidden_states = ops.dropout_residual(hidden_states, block.dropout)
    if block.order in ("post", "sandwich"):
        hidden_states = norm(ops, block, hidden_states)
    output = _add(ops, block, residual, hidden_states)
    del held
    return output


def _parallel(ops: Ops, block: DecoderLayer, hidden_states: Tensor) -> Tensor:
    residual = hidden_states
    hidden_states = norm(ops, block, residual)
    attended = ops.dropout_residual(_attention(ops, block, hidden_states), block.dropout)
    if block.two_norms:
        hidden_states = norm(ops, block, residual)
    fed_forward = ops.dropout_residual(_feed_forward(ops, block, hidden_states), block.dropout)
    return ops.add(ops.add(attended, fed_forward), residual)


def _add(ops: Ops, block: DecoderLayer, residual: Tensor, hidden_states: Tensor) -> Tensor:
    if block.residual_scale:
        hidden_states = ops.times_number(hidden_states)
    return ops.add(residual, hidden_states)


def norm(ops: Ops, block: DecoderLayer, x: Tensor) -> Tensor:
    """Replay the family's normalization."""
    if block.norm == "cohere":
        return cohere.layer_norm(ops, x)
    if block.norm == "layer":
        return ops.layer_norm(x, weight=block.norm_itemsize)
    return ops.rms_norm(x, weight=block.norm_itemsize, scale_in_float=block.norm == "float")


def _attention(ops: Ops, block: DecoderLayer, hidden_states: Tensor) -> Tensor:
    if block.find("attention", "kv_b_proj"):
        linears = {module.name: module for module in block.linears if module.part == "attention"}
        attended = latent_attention(
            ops, linears, block.heads, block.kernel, hidden_states, block.norm_itemsize
        )
        return linear(ops, attended, linears["o_proj"])
    query, key, value = _project(ops, block, hidden_states)
    if block.norm == "cohere":
        query, key = cohere.rotate(ops, query, key)
    elif block.rotary and ops.triton and block.rotates_halves:
        query, key = ops.rotate_together(query, key)
    elif block.rotary:
        query, key = ops.rotate(query), ops.rotate(key)
    key, value, heads = repeated(ops, key, value, block.heads)
    attended = attend(ops, query, key, value, heads, block.kernel)
    output = block.find("attention", "o_proj", "dense", "out_proj", "c_proj")
    return linear(ops, attended, output) if output else attended


def _project(ops: Ops, block: DecoderLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = block.find("attention", "qkv_proj", "query_key_value", "c_attn")
    shape = block.heads
    if whole:
        together = linear(ops, hidden_states, whole)
        if whole.name != "qkv_proj" and shape.heads == shape.kv_heads:
            third = together.numel // 3
            query, key, value = ops.split(together, third, third, third)
            return query, key, value
        kv = shape.rows * shape.length * shape.kv_heads * shape.head_dim
        if whole.name == "c_attn":
            query, key, value = ops.split(together, together.numel - 2 * kv, kv, kv)
            return query, key, value
        query = ops.slice(together, together.numel - 2 * kv)
        return query, ops.slice(together, kv), ops.slice(together, kv)
    parts = [block.find("attention", name) for name in ("q_proj", "k_proj", "v_proj")]
    grouped = group(ops, hidden_states, *parts)
    projections: list[Tensor] = []
    for part in parts:
        x = _linear_of(ops, hidden_states, part, grouped)
        if block.head_norms != "no" and len(projections) < 2:
            x = norm(ops, block, x)
        projections.append(x)
        del x
    return projections[0], projections[1], projections.pop()


def _feed_forward(ops: Ops, block: DecoderLayer, x: Tensor) -> Tensor:
    """Replay the MLP, or the routed experts and the shared one."""
    if block.mixture is None:
        return _mlp(ops, block, x, "mlp")
    shared_gate = block.find("shared_expert", "shared_expert_gate")
    shared = _mlp(ops, block, x, "shared_expert") if shared_gate else None
    routed = mixture(ops, block.mixture, x)
    if shared_gate and shared:
        activated_gate = ops.activation(linear(ops, x, shared_gate), "tanh")  # sigmoid: saves its result
        return ops.add(routed, weighted(ops, shared, activated_gate))
    if block.find("shared_expert", "down_proj"):
        return ops.add(routed, _mlp(ops, block, x, "shared_expert"))
    return routed


def _mlp(ops: Ops, block: DecoderLayer, x: Tensor, part: str) -> Tensor:
    down = block.find(part, "down_proj", "fc2", "dense_4h_to_h", "c_proj")
    if block.gated:
        whole = block.find(part, "gate_up_proj")
        if whole:
            both = linear(ops, x, whole)
            gate, up = ops.split(both, both.numel // 2, both.numel // 2)
            del both
            product = ops.multiply(up, ops.activation(gate, block.activation))
            del gate, up
        elif down and uses_fused_lora(ops, down):
            gate_proj, up_proj = block.find(part, "gate_proj"), block.find(part, "up_proj")
            together = group(ops, x, gate_proj, up_proj)
            gate = _linear_of(ops, x, gate_proj, together)
            one_kernel = ops.triton and block.activation in TRITON_ACTIVATIONS
            up = _linear_of(ops, x, up_proj, together)
            return fused_lora.gated(ops, gate, up, down, one_kernel=one_kernel)
        else:
            product = _gated(ops, block, x, part)
    else:
        wide = block.find(part, "up_proj", "fc1", "dense_h_to_4h", "c_fc")
        product = ops.activation(linear(ops, x, wide) if wide else x, block.activation)
    return linear(ops, product, down) if down else product


def _gated(ops: Ops, block: DecoderLayer, x: Tensor, part: str) -> Tensor:
    """Replay ``act_fn(gate_proj(x)) * up_proj(x)``: the activation's input is freed if nothing saved it."""
    gate, up = block.find(part, "gate_proj"), block.find(part, "up_proj")
    together = group(ops, x, gate, up)
    activated_gate = ops.activation(_linear_of(ops, x, gate, together), block.activation)
    return ops.multiply(activated_gate, _linear_of(ops, x, up, together))


def _linear_of(ops: Ops, x: Tensor, module: Linear | None, together: dict[str, Tensor]) -> Tensor:
    """Return a module's output: computed with others before, or now; x itself without a module."""
    if module is None:
        return x
    return together.pop(module.name) if module.name in together else linear(ops, x, module)
