"""The model of one run as the estimate reads it: the shapes of each layer's modules, and the trained tensors.

:func:`build_layout` builds the layout from an architecture, a recipe and the code path. Nothing here depends
on the model's family: the role of a module follows from its part of the layer and its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

from qlora_tui.catalog.architecture_types import Architecture, LinearModule, Parameter
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.weights import expert_method, quantizes
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import rank_of, resolve_targets

USUAL_MLPS = 3
"""Maximum number of parts of a usual layer that transform each token: MLP, shared experts, their gate."""
USUAL_ACTIVATIONS = frozenset(
    ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "xielu")
)
"""Activations for which the number of saved tensors is known."""
USUAL_CHUNK = 64
"""Number of tokens that gated delta rules compute at a time.

It is ``chunk_size`` of ``torch_chunk_gated_delta_rule``.
"""
FUSED_HALVES = 2
"""Width of a gated MLP's first projections (gate and up) together, relative to the last one's input."""


@dataclass(frozen=True)
class Linear:
    """One linear module of a layer, as the trainer runs it."""

    name: str
    inputs: int
    outputs: int
    method: Literal["nf4", "fp4", "int8", "none"]
    part: str = "other"
    """Part of the layer, as in the catalog: ``attention``, ``mlp``, ``shared_expert``."""
    rank: int = 0
    """Rank of the module's adapter; 0 if the module is not a target."""
    dora: bool = False
    owner: str = ""
    """Name of the module that contains it; empty for the layer itself."""

    @property
    def weights(self) -> int:
        """Return the number of elements of the base weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Block:
    """The linear modules of one part of a layer: its first, middle and last projections."""

    first: tuple[Linear, ...]
    """Modules that read the hidden states, in order; in attention those of queries, keys and values."""
    middle: tuple[Linear, ...]
    """Modules that do not read the hidden states, without the last projection.

    Their input has another width, as in latent attention or after a convolution.
    """
    last: Linear | None
    """The projection back to the hidden states."""

    @property
    def modules(self) -> tuple[Linear, ...]:
        return (*self.first, *self.middle, *((self.last,) if self.last else ()))

    @property
    def width(self) -> int:
        """Return the width of the last projection's input.

        Without a last projection, return the largest width of the first projections' outputs.
        """
        if self.last:
            return self.last.inputs
        return max((module.outputs for module in self.first), default=0)

    @property
    def first_width(self) -> int:
        """Return the total width of the first projections' outputs."""
        return sum(module.outputs for module in self.first)

    @property
    def gated(self) -> bool:
        """Return whether an MLP is gated: it multiplies two projections, computed by one module or two."""
        return self.first_width >= FUSED_HALVES * self.width

    @property
    def is_fused(self) -> bool:
        """Return whether one module computes all first projections."""
        return len(self.first) == 1


@dataclass(frozen=True)
class Heads:
    """The widths of a layer's attention, in elements per token."""

    heads: int
    query: int
    key: int
    value: int
    """Width of the values. Like ``key``, it is the width before values are repeated for the query heads."""
    output: int
    gate: int = 0
    """Width of a gate on the output, which the query projection also computes."""
    joined: bool = False
    """Whether one projection computes queries, keys and values, so that values stay views of its output."""
    softcap: bool = False
    sinks: bool = False
    """Whether a learned logit for each head takes part in the softmax."""
    rotary: bool = True

    @property
    def is_grouped(self) -> bool:
        """Return whether several query heads share keys and values."""
        return self.key < self.query


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one layer: two fused three-dimensional parameters, or ``separate`` modules."""

    experts: int
    per_token: int
    intermediate: int
    has_biases: bool
    separate: bool = False
    """Whether each expert's matrices are separate modules (transformers 4)."""
    method: str = "none"
    """Quantization of the experts."""
    ranks: tuple[int, ...] = (0, 0)
    """Ranks of the adapters on gate and up, and on down; 0 without an adapter."""

    @property
    def is_one_at_a_time(self) -> bool:
        """Return whether qlora-tui's own forward computes the experts, one after another."""
        return not self.separate and (self.method != "none" or any(self.ranks))


@dataclass(frozen=True)
class Layer:
    """The modules of one layer, which determine its computation."""

    attention: Block | None
    heads: Heads | None
    mixer: Block | None
    """The block that replaces attention in some layers of a hybrid model, or runs in addition to it."""
    mlps: tuple[Block, ...]
    """The MLP, the shared expert, and other blocks that transform each token."""
    mixture: Mixture | None
    norms: tuple[int, ...]
    """Width of each norm's input; for per-head norms, the width of all heads together."""
    convolved: int
    """Number of channels of the layer's convolutions."""
    state_width: int
    """Elements per token of the matrices that a recurrent mixer computes in chunks; 0 without a mixer."""

    @cached_property
    def modules(self) -> tuple[Linear, ...]:
        blocks = [block for block in (self.attention, self.mixer, *self.mlps) if block]
        return tuple(module for block in blocks for module in block.modules)


@dataclass(frozen=True)
class Layout:
    """The model of one run: its resident tensors, and its layers in order."""

    recipe: Recipe
    architecture: Architecture
    execution: ExecutionConfig
    layers: tuple[Layer, ...]
    """Equal layers are the same object. A layer that runs several times occurs as many times."""
    tokens: int
    rows: int
    length: int
    hidden: int
    vocabulary: int
    layer_norm: bool
    """Whether norms are LayerNorms, which torch computes in one kernel."""
    modifies_embedding: bool
    """Whether the first layer's input differs from the embedding's output, as with learned positions."""
    token_rows: int
    """Number of tokens whose rows of embedding and head are trained."""
    trained_matrix: int
    """Number of elements of the head if embedding and head are trained completely; otherwise 0."""
    own_head: bool
    """Whether the head is untied, and trained separately from the embedding."""
    adapter_shapes: tuple[tuple[int, ...], ...]
    """Shape of each trained tensor."""
    lora_tensors: tuple[int, ...]
    """Number of elements of each tensor in the adapters of linear modules.

    These tensors have copies in the compute dtype.
    """
    experts_in_16_bits: bool
    """Whether the model has fused experts that are not quantized."""

    @cached_property
    def adapter_tensors(self) -> tuple[int, ...]:
        """Return the number of elements of each trained tensor."""
        return tuple(map(prod, self.adapter_shapes))

    @property
    def adapter_parameters(self) -> int:
        return sum(self.adapter_tensors)

    @cached_property
    def repeats_states(self) -> bool:
        """Return whether hidden states are repeated.

        They are if every expert computes all tokens (Llama 4), if layers run several times (HRM), or if a
        layer has more parts than usual that transform each token (Gemma 3n).
        """
        experts = self.architecture.experts
        if self.architecture.layer_runs or (experts is not None and experts.see_all_tokens):
            return True
        return any(len(each.mlps) > USUAL_MLPS for each in self.layers)

    @cached_property
    def computes_more_scores(self) -> bool:
        """Return whether the model's class computes attention scores without a fused kernel.

        These are scores that select the tokens to attend to (DeepSeek V3.2), or, on a CPU, all scores of a
        class with its own attention code.
        """
        own = self.architecture.own_attention and self.execution.device == "cpu"
        return bool(self.architecture.index_heads) or own

    @cached_property
    def exact(self) -> bool:
        """Return whether the memory of a step follows from known shapes.

        False for a mere outline of a model, for a class with its own code, if hidden states are repeated, or
        if the class computes scores without a fused kernel. Also false if anything but attention mixes
        tokens, because the memory of such a mixer depends on the kernels.
        """
        architecture = self.architecture
        known = not (architecture.is_outline or architecture.own_code)
        known = known and not (self.repeats_states or self.computes_more_scores)
        return known and all(layer.mixer is None for layer in self.layers)

    @property
    def hides_tensors(self) -> bool:
        """Return whether the class's code has tensors that the shapes of its modules do not show."""
        architecture = self.architecture
        own = architecture.own_code or (architecture.own_attention and any(e.attention for e in self.layers))
        return own or self.repeats_states or self.computes_more_scores

    @property
    def is_unusual(self) -> bool:
        """Return whether layers have parts that only a few families have.

        These are an activation that is not in ``USUAL_ACTIVATIONS``, modules in addition to attention and MLP
        (Gemma 4), or, on a CPU, attention sinks, which the CPU's kernel does not support.
        """
        if self.architecture.activation not in USUAL_ACTIVATIONS:
            return True
        sinks = any(layer.heads is not None and layer.heads.sinks for layer in self.layers)
        if sinks and self.execution.device == "cpu":
            return True
        return any(m.part == "other" and m.layer is not None for m in self.architecture.modules)


def build_layout(
    recipe: Recipe, architecture: Architecture, execution: ExecutionConfig, *, has_adapter: bool = True
) -> Layout:
    """Build every layer with its modules as this recipe and code run them, with or without adapter."""
    targets = resolve_targets(recipe.lora, architecture.targets) if has_adapter else ()
    ranks = {module.name: rank_of(recipe.lora, module) for module in targets}
    modules: list[list[Linear]] = [[] for _ in range(architecture.layers)]
    parameters: list[list[Parameter]] = [[] for _ in range(architecture.layers)]
    experts: list[list[LinearModule]] = [[] for _ in range(architecture.layers)]
    for module in architecture.modules:
        if module.layer is not None and module.part != "vision":
            modules[module.layer].append(_linear(module, recipe, ranks.get(module.name, 0)))
    for parameter in architecture.parameters:
        if parameter.layer is not None and parameter.role != "vision":
            parameters[parameter.layer].append(parameter)
    for module in architecture.expert_modules:
        if module.layer is not None:
            experts[module.layer].append(module)
    known: dict[tuple[object, ...], Layer] = {}
    """Layers keyed by their modules and parameters, so that equal layers are the same object."""
    layers = []
    shapes: list[tuple[int, ...]] = []
    expert_shapes: list[tuple[int, ...]] = []
    for linears, others, projections in zip(modules, parameters, experts, strict=True):
        for each in linears:
            if each.rank:
                shapes += [(each.rank, each.inputs), (each.outputs, each.rank)]
                shapes += [(each.outputs,)] if each.dora else []
        by_kind = {module.kind: ranks.get(module.name, 0) for module in projections}
        adapted = tuple(by_kind.get(f"experts.{name}", 0) for name in ("gate_up_proj", "down_proj"))
        for module in projections:
            if width := by_kind[module.kind] * module.copies:
                expert_shapes += [(width, module.in_features), (module.out_features, width)]
        key = (tuple(map(id, linears)), tuple((other.role, other.shape) for other in others), adapted)
        if key not in known:
            routed = _mixture(recipe, architecture, execution, others, adapted)
            known[key] = _layer(linears, others, architecture, routed)
        layers.append(known[key])
    lora_tensors = tuple(map(prod, shapes))
    shapes += expert_shapes
    shapes += vocabulary_shapes(recipe.lora, architecture)
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    return Layout(
        recipe=recipe,
        architecture=architecture,
        execution=execution,
        layers=tuple(
            layer
            for layer, runs in zip(layers, architecture.layer_runs or [1] * len(layers), strict=True)
            for _ in range(runs)
        ),
        tokens=rows * length,
        rows=rows,
        length=length,
        hidden=architecture.hidden_size,
        vocabulary=architecture.vocab_size,
        layer_norm=any(p.role == "norm" and p.name.endswith(".bias") for p in architecture.parameters),
        modifies_embedding=len(architecture.embeddings) > 1,
        token_rows=len(set(recipe.lora.trainable_tokens)),
        trained_matrix=architecture.head.weight_params if recipe.lora.train_embeddings else 0,
        own_head=not architecture.head.tied,
        adapter_shapes=tuple(shapes),
        lora_tensors=lora_tensors,
        experts_in_16_bits=bool(architecture.expert_modules)
        and expert_method(recipe, architecture, execution) == "none"
        and not execution.separate_experts,
    )


def vocabulary_shapes(lora: Lora, architecture: Architecture) -> list[tuple[int, ...]]:
    """Return the shapes of the trained parts of the embedding (rows or all) and of an untied head."""
    head = architecture.head
    rows = head.out_features if lora.train_embeddings else len(set(lora.trainable_tokens))
    return [(rows, head.in_features)] * (1 if head.tied else 2) if rows else []


def _mixture(
    recipe: Recipe,
    architecture: Architecture,
    execution: ExecutionConfig,
    parameters: list[Parameter],
    ranks: tuple[int, ...],
) -> Mixture | None:
    experts = architecture.experts
    if experts is None or not any(parameter.is_expert_matrices for parameter in parameters):
        return None
    return Mixture(
        experts=experts.count,
        per_token=experts.count if experts.see_all_tokens else experts.per_token,
        intermediate=experts.intermediate_size,
        has_biases=any(p.role == "expert" and not p.is_expert_matrices for p in parameters),
        separate=execution.separate_experts,
        method=recipe.quantization.method
        if execution.separate_experts
        else expert_method(recipe, architecture, execution),
        ranks=ranks,
    )


def _layer(
    linears: list[Linear], parameters: list[Parameter], architecture: Architecture, mixture: Mixture | None
) -> Layer:
    hidden = architecture.hidden_size

    def block(*parts: str) -> Block | None:
        modules = [module for module in linears if module.part in parts]
        return _block(modules, hidden) if modules else None

    attention, mixer = block("attention"), block("mixer")
    heads = None
    if attention:
        learned = {p.shape for p in parameters if f".{attention.modules[0].owner}." in p.name}
        heads = _heads(attention, architecture, learned)
    norms = tuple(_norm_widths(parameters, heads, mixer, hidden))
    convolved = sum(p.shape[0] for p in parameters if p.role == "conv" and len(p.shape) > 1)
    owned: dict[tuple[str, str], list[Linear]] = {}
    for module in linears:
        if module.part not in ("attention", "mixer", "router"):
            owned.setdefault((module.part, module.owner), []).append(module)
    mlps = tuple(_block(modules, hidden) for modules in owned.values())
    # One value per head, or per channel of a head if channels decay separately.
    decays = max((p.shape[0] for p in parameters if p.role == "other" and len(p.shape) == 1), default=0)
    chunk = architecture.chunk_size or (0 if architecture.state_size else USUAL_CHUNK)
    state_width = decays * (architecture.state_size + chunk) if mixer else 0
    return Layer(attention, heads, mixer, mlps, mixture, norms, convolved, state_width)


def _block(modules: list[Linear], hidden: int) -> Block:
    """Sort the modules of a part by their inputs and outputs.

    The last projection is the one whose output is as wide as the hidden states. If there are several, it is
    the one with the widest input among those whose input differs in width from the hidden states. If all of
    them are square, it is the last one in the model's order.
    """
    back = [module for module in modules if module.outputs == hidden]
    narrowing = [module for module in back if module.inputs != hidden]
    last = None
    if len(modules) > 1 and back:
        last = max(narrowing, key=lambda module: module.inputs) if narrowing else back[-1]
    others = [module for module in modules if module is not last]
    first = tuple(module for module in others if module.inputs == hidden)
    return Block(first, tuple(module for module in others if module.inputs != hidden), last)


def _heads(attention: Block, architecture: Architecture, learned: set[tuple[int, ...]]) -> Heads:
    """Derive the widths of queries, keys and values from the projections' outputs."""
    output, heads = attention.width, architecture.heads
    outputs = [module.outputs for module in attention.first]
    gate = 0
    if attention.middle:  # latent: keys and values come from compressed projections
        query = key = heads * architecture.head_dim
        value = output
    elif len(outputs) == 1:
        query = output
        key = value = max(outputs[0] - query, 0) // 2
    else:
        query, gate = output, output if outputs[0] == 2 * output else 0
        key = outputs[1]
        value = outputs[2] if len(outputs) > 2 else key  # one projection computes both
    return Heads(
        heads=heads,
        query=query,
        key=key,
        value=value,
        output=output,
        gate=gate,
        joined=len(outputs) == 1 and key > 0,
        softcap=architecture.attention_softcap,
        sinks=(heads,) in learned,
        rotary=len(architecture.embeddings) == 1,
    )


def _norm_widths(
    parameters: list[Parameter], heads: Heads | None, mixer: Block | None, hidden: int
) -> list[int]:
    """Return the width of each norm's input; for a norm over one head, the width of all heads together."""
    over_heads = [heads.query, heads.key, heads.value] if heads else []
    widths = []
    for parameter in parameters:
        if parameter.role != "norm" or len(parameter.shape) != 1 or parameter.name.endswith(".bias"):
            continue
        width = parameter.shape[0]
        if heads and width * heads.heads == heads.query:
            width = over_heads.pop(0) if over_heads else width
        elif mixer and width < hidden and mixer.width % width == 0:
            width = mixer.width
        widths.append(width)
    # Norms without weights have no parameters.
    return widths if hidden in widths else [*widths, hidden, hidden]


def _linear(module: LinearModule, recipe: Recipe, rank: int) -> Linear:
    """Return the module as the trainer holds it, with rank 0 if it is not a target."""
    method = recipe.quantization.method if quantizes(recipe.quantization, module) else "none"
    dora = recipe.lora.use_dora and rank > 0
    owner = module.name.rpartition(".")[0].rpartition(".")[2]
    return _cached_linear(
        module.kind,
        module.in_features,
        module.out_features,
        method,
        module.part,
        rank,
        dora,
        "" if owner.isdigit() else owner,
    )


_cached_linear = lru_cache(maxsize=4096)(Linear)
"""Returns the same object for equal modules, so that layers can be compared by the ids of their modules."""
