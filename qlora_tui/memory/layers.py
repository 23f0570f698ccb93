"""The decoder layers of a model, and the replay of one, following its ``forward`` in transformers.

:func:`build_layout` makes the layers that a run executes, from an architecture and the code path;
:func:`run_block` replays one on a tape. Names and lifetimes of the variables follow the library's, because
they decide when a tensor is freed. A new model family gets an entry in :data:`STYLES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.memory.attention import Heads, attend, latent_attention
from qlora_tui.memory.autograd import Tensor
from qlora_tui.memory.execution import (
    ExecutionConfig,
    Kernel,
    flash_trains,
)
from qlora_tui.memory.experts import Mixture, mixture, weighted
from qlora_tui.memory.linear import gated, group, linear, uses_fused_lora
from qlora_tui.memory.ops import Linear, Ops
from qlora_tui.memory.weights import expert_method
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import rank_of, resolve_targets

TRITON_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Activations that the Triton kernel of a gated MLP has, under their names in configs."""


@dataclass(frozen=True)
class LayerStyle:
    """Structure of a family's layer; sizes come from the architecture."""

    norm: Literal["rms", "float", "layer", "cohere"] = "rms"
    """float: an RMSNorm that multiplies by its weight in float32 (Gemma, OLMo-2). cohere: a LayerNorm written
    out in float32, and rotary positions in float32 too."""
    order: Literal["pre", "parallel", "sandwich", "post"] = "pre"
    """pre: norm before each half. parallel: both halves read the layer's input, normalized. sandwich: norms
    on both sides of each half (Gemma 2 and 3). post: norms after each half (OLMo-2)."""
    head_norms: bool = False
    """Whether queries and keys are normalized, per head (Qwen3, Gemma 3) or over the full width (OLMo-2)."""
    rotary: bool = True
    rotates_halves: bool = True
    """Whether rotary positions pair the halves of a head, as our kernel does, not even and odd columns."""
    residual_scale: bool = False
    """Whether each half is multiplied by a number before it is added (Granite)."""
    keeps_attention_output: bool = False
    """Whether ``forward()`` keeps the attention output alive until it returns (StableLM)."""


STYLES: dict[str, LayerStyle] = {
    "llama": LayerStyle(),
    "mistral": LayerStyle(),
    "qwen2": LayerStyle(),
    "smollm3": LayerStyle(),
    "qwen3": LayerStyle(head_norms=True),
    "ernie4_5": LayerStyle(rotates_halves=False),
    "phi3": LayerStyle(),
    "gemma": LayerStyle(norm="float"),
    "gemma2": LayerStyle(norm="float", order="sandwich"),
    "gemma3": LayerStyle(norm="float", order="sandwich", head_norms=True),
    "gemma3_text": LayerStyle(norm="float", order="sandwich", head_norms=True),
    "mixtral": LayerStyle(),
    "qwen2_moe": LayerStyle(),
    "qwen3_moe": LayerStyle(head_norms=True),
    "gpt_oss": LayerStyle(rotates_halves=False),
    "deepseek_v2": LayerStyle(),
    "granite": LayerStyle(residual_scale=True),
    "olmo2": LayerStyle(norm="float", order="post", head_norms=True),
    "stablelm": LayerStyle(norm="layer", keeps_attention_output=True),
    "opt": LayerStyle(norm="layer", rotary=False),
    "gpt2": LayerStyle(norm="layer", rotary=False),
    "gpt_bigcode": LayerStyle(norm="layer", rotary=False),
    "starcoder2": LayerStyle(norm="layer"),
    "arcee": LayerStyle(),
    "ministral3": LayerStyle(),
    "helium": LayerStyle(rotates_halves=False),
    "glm": LayerStyle(rotates_halves=False),
    "glm4": LayerStyle(order="sandwich", rotates_halves=False),
    "nemotron": LayerStyle(norm="layer"),
    "hunyuan_v1_dense": LayerStyle(head_norms=True),
    "olmo3": LayerStyle(norm="float", order="post", head_norms=True),
    "exaone4": LayerStyle(order="post", head_norms=True),
    "cohere2": LayerStyle(norm="cohere", order="parallel"),
    "olmoe": LayerStyle(head_norms=True),
    "phi": LayerStyle(norm="layer", order="parallel"),
    "gpt_neox": LayerStyle(norm="layer", order="parallel"),
    "falcon": LayerStyle(norm="layer", order="parallel"),
    "cohere": LayerStyle(norm="cohere", order="parallel"),
}
"""Families with an implemented layer; any other is replayed as Llama's and marked as approximate."""
GPT_2 = ("gpt2", "gpt_bigcode")
"""Families that apply dropout to the embedding too."""


@dataclass(frozen=True)
class DecoderLayer:
    """Structure of one layer."""

    linears: tuple[Linear, ...]
    heads: Heads
    style: LayerStyle
    two_norms: bool
    """Whether parallel halves have a norm each (GPT-NeoX) or share one (Phi-2)."""
    activation: str
    gated: bool
    kernel: Kernel
    mixture: Mixture | None
    """Routed experts instead of the MLP."""
    dropout: float
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
    if block.style.order == "parallel":
        return _parallel(ops, block, hidden_states)
    residual = hidden_states
    if block.style.order != "post":
        hidden_states = norm(ops, block, hidden_states)
    hidden_states = _attention(ops, block, hidden_states)
    hidden_states = ops.dropout_residual(hidden_states, block.dropout)
    if block.style.order in ("post", "sandwich"):
        hidden_states = norm(ops, block, hidden_states)
    held = hidden_states if block.style.keeps_attention_output else None
    hidden_states = _add(ops, block, residual, hidden_states)
    residual = hidden_states
    if block.style.order != "post":
        hidden_states = norm(ops, block, hidden_states)
    hidden_states = _feed_forward(ops, block, hidden_states)
    hidden_states = ops.dropout_residual(hidden_states, block.dropout)
    if block.style.order in ("post", "sandwich"):
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
    if block.style.residual_scale:
        hidden_states = ops.times_number(hidden_states)
    return ops.add(residual, hidden_states)


def norm(ops: Ops, block: DecoderLayer, x: Tensor) -> Tensor:
    """Replay the family's normalization."""
    if block.style.norm == "cohere":
        return ops.cohere_norm(x)
    if block.style.norm == "layer":
        return ops.layer_norm(x)
    return ops.rms_norm(x, scale_in_float=block.style.norm == "float")


def _attention(ops: Ops, block: DecoderLayer, hidden_states: Tensor) -> Tensor:
    if block.find("attention", "kv_b_proj"):
        linears = {module.name: module for module in block.linears if module.part == "attention"}
        attended = latent_attention(ops, linears, block.heads, block.kernel, hidden_states)
        return linear(ops, attended, linears["o_proj"])
    query, key, value = _project(ops, block, hidden_states)
    if block.style.norm == "cohere":
        query, key = ops.rotate_in_float(query, key)
    elif block.style.rotary and ops.triton and block.style.rotates_halves:
        query, key = ops.rotate_together(query, key)
    elif block.style.rotary:
        query, key = ops.rotate(query), ops.rotate(key)
    attended = attend(ops, query, key, value, block.heads, block.kernel)
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
        if block.style.head_norms and len(projections) < 2:
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
        else:
            gate_proj, up_proj = block.find(part, "gate_proj"), block.find(part, "up_proj")
            together = group(ops, x, gate_proj, up_proj)
            if down and uses_fused_lora(ops, down):
                gate = _linear_of(ops, x, gate_proj, together)
                one_kernel = ops.triton and block.activation in TRITON_ACTIVATIONS
                up = _linear_of(ops, x, up_proj, together)
                return gated(ops, gate, up, down, one_kernel=one_kernel)
            # The activation's input is freed if nothing saved it.
            activated_gate = ops.activation(_linear_of(ops, x, gate_proj, together), block.activation)
            product = ops.multiply(activated_gate, _linear_of(ops, x, up_proj, together))
            del activated_gate
    else:
        wide = block.find(part, "up_proj", "fc1", "dense_h_to_4h", "c_fc")
        product = ops.activation(linear(ops, x, wide) if wide else x, block.activation)
    return linear(ops, product, down) if down else product


def _linear_of(ops: Ops, x: Tensor, module: Linear | None, together: dict[str, Tensor]) -> Tensor:
    """Return a module's output: computed with others before, or now; x itself without a module."""
    if module is None:
        return x
    return together.pop(module.name) if module.name in together else linear(ops, x, module)


@dataclass(frozen=True)
class Layout:
    """The model of one run: its resident tensors, and its layers in order."""

    recipe: Recipe
    architecture: Architecture
    execution: ExecutionConfig
    blocks: tuple[DecoderLayer, ...]
    """One entry per layer; equal layers are the same object."""
    tokens: int
    rows: int
    length: int
    hidden: int
    vocabulary: int
    modifies_embedding: bool
    """Whether the first layer's input differs from the embedding's output: positions or a factor."""
    embedding_dropout: float
    softcap: bool
    logit_scale: bool
    token_rows: int
    """Number of tokens whose rows of embedding and head are trained."""
    trained_matrix: int
    """Elements of the head where embedding and head are trained in whole; else 0."""
    own_head: bool
    """Whether the head is untied, and trained apart from the embedding."""
    adapter_parameters: int
    adapter_shapes: tuple[tuple[int, ...], ...]
    """Shape of each trained tensor."""
    lora_tensors: tuple[int, ...]
    """Those of linear modules, which have copies in the compute dtype."""
    exact: bool
    """Whether the family's layer is implemented."""
    experts_in_16_bits: bool
    """Whether the model has fused experts that are not quantized."""

    @cached_property
    def adapter_tensors(self) -> tuple[int, ...]:
        """Return the elements of each trained tensor."""
        return tuple(map(prod, self.adapter_shapes))


def build_layout(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> Layout:
    """Build every layer with its modules as this recipe and trainer code run them."""
    ranks = {m.name: rank_of(recipe.lora, m) for m in resolve_targets(recipe.lora, architecture.targets)}
    style = STYLES.get(architecture.model_type, LayerStyle())
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    by_layer: list[list[LinearModule]] = [[] for _ in range(architecture.layers)]
    for module in architecture.modules:
        if module.layer is not None and module.part != "vision":
            by_layer[module.layer].append(module)
    # The kernel for a whole row neither caps scores nor has sinks or dropout.
    softcap, sinks = architecture.model_type == "gemma2", architecture.model_type == "gpt_oss"
    attention, varlen = execution.attention, execution.varlen
    if execution.device == "cuda" and not flash_trains(execution.capability, architecture.head_dim):
        # SDPA chooses its memory-efficient kernel, sample by sample.
        attention = "efficient" if execution.attention == "flash" else execution.attention
        varlen = False
    in_one_call = varlen and not (softcap or sinks or architecture.attention_dropout)
    heads = Heads(
        rows=rows,
        length=length,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        value_dim=architecture.head_dim,
        pieces=rows if execution.segments and not in_one_call else 1,
        samples=(execution.samples or rows) if in_one_call else 0,
        softcap=softcap,
        sinks=sinks,
        repeated=attention == "efficient",
    )
    # Falcon passes SDPA one key head for all query heads, which no fused kernel supports.
    shared = architecture.model_type == "falcon" and architecture.heads != architecture.kv_heads
    kernel = "math" if shared and attention != "eager" else attention
    experts: list[list[LinearModule]] = [[] for _ in range(architecture.layers)]
    for module in architecture.expert_modules:
        if module.layer is not None:
            experts[module.layer].append(module)
    norms = [
        parameter.name
        for parameter in architecture.parameters
        if (parameter.layer, parameter.role, parameter.shape) == (0, "norm", (architecture.hidden_size,))
        and parameter.name.endswith(".weight")
    ]
    known: dict[tuple[tuple[int, ...], Mixture | None], DecoderLayer] = {}
    """Layers by their modules, of which equal ones are the same object."""
    routed = _mixture(recipe, architecture, execution)
    blocks = []
    shapes: list[tuple[int, ...]] = []
    expert_shapes: list[tuple[int, ...]] = []
    for modules, projections in zip(by_layer, experts, strict=True):
        linears = tuple([_linear(module, recipe, ranks.get(module.name, 0)) for module in modules])
        for each in linears:
            if each.rank:
                shapes += [(each.rank, each.inputs), (each.outputs, each.rank)]
                shapes += [(each.outputs,)] if each.dora else []
        of_layer = None if any(each.part == "mlp" for each in linears) else routed
        if of_layer is not None:
            adapted = tuple(ranks.get(module.name, 0) for module in projections)
            of_layer = replace(of_layer, ranks=adapted)
            for module, rank in zip(projections, adapted, strict=True):
                if rank:
                    width = rank * module.copies
                    expert_shapes += [(width, module.in_features), (module.out_features, width)]
        key = (tuple(map(id, linears)), of_layer)
        if key not in known:
            known[key] = DecoderLayer(
                linears=linears,
                heads=heads,
                style=style,
                two_norms=len(norms) > 1,
                activation=architecture.activation,
                gated=architecture.gated,
                kernel=kernel,
                mixture=of_layer,
                dropout=architecture.residual_dropout,
            )
        blocks.append(known[key])
    lora_tensors = tuple(map(prod, shapes))
    shapes += expert_shapes
    shapes += vocabulary_shapes(recipe.lora, architecture)
    return Layout(
        recipe=recipe,
        architecture=architecture,
        execution=execution,
        blocks=tuple(blocks),
        tokens=rows * length,
        rows=rows,
        length=length,
        hidden=architecture.hidden_size,
        vocabulary=architecture.vocab_size,
        modifies_embedding=len(architecture.embeddings) > 1 or architecture.model_type == "granite",
        embedding_dropout=architecture.residual_dropout if architecture.model_type in GPT_2 else 0.0,
        softcap=architecture.final_logit_softcapping is not None,
        logit_scale=architecture.logit_scale is not None,
        token_rows=len(set(recipe.lora.trainable_tokens)),
        trained_matrix=architecture.head.weight_params if recipe.lora.train_embeddings else 0,
        own_head=not architecture.head.tied,
        adapter_parameters=sum(map(prod, shapes)),
        adapter_shapes=tuple(shapes),
        lora_tensors=lora_tensors,
        exact=architecture.model_type in STYLES,
        experts_in_16_bits=bool(architecture.expert_modules)
        and expert_method(recipe, architecture, execution) == "none"
        and not execution.separate_experts,
    )


def vocabulary_shapes(lora: Lora, architecture: Architecture) -> list[tuple[int, ...]]:
    """Return the shape of what is trained of the embedding, rows or all, and of an untied head."""
    head = architecture.head
    rows = head.out_features if lora.train_embeddings else len(set(lora.trainable_tokens))
    return [(rows, head.in_features)] * (1 if head.tied else 2) if rows else []


def _mixture(recipe: Recipe, architecture: Architecture, execution: ExecutionConfig) -> Mixture | None:
    experts = architecture.experts
    if experts is None:
        return None
    return Mixture(
        experts=experts.count,
        per_token=experts.per_token,
        hidden=architecture.hidden_size,
        intermediate=experts.intermediate_size,
        activation=architecture.activation,
        clamped=architecture.model_type == "gpt_oss",
        wide_weights=architecture.model_type in ("mixtral", "deepseek_v2") and not execution.separate_experts,
        separate=execution.separate_experts,
        method=recipe.quantization.method,
        expert_method=expert_method(recipe, architecture, execution),
    )


def _linear(module: LinearModule, recipe: Recipe, rank: int) -> Linear:
    """Return the module as the trainer holds it, with rank 0 where it is no target."""
    method = recipe.quantization.method if module.quantizable else "none"
    dora = recipe.lora.use_dora and rank > 0
    return _cached_linear(
        module.kind, module.in_features, module.out_features, method, module.part, rank, dora
    )


_cached_linear = lru_cache(maxsize=4096)(Linear)
"""Equal modules are the same object, so that layers compare by their modules' identities."""
