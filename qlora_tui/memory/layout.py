"""Builds the layers that a replayed step runs, from an architecture and the code path.

A new model family gets an entry in :data:`STYLES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.memory.attention import Heads, Kernel
from qlora_tui.memory.decoder_layer import DecoderLayer
from qlora_tui.memory.execution import ExecutionConfig, flash_trains
from qlora_tui.memory.four_bit import expert_method
from qlora_tui.memory.mixture import Mixture
from qlora_tui.memory.ops import Linear
from qlora_tui.memory.versions import (
    LossCode,
    copies_for_sdpa,
    loss_code,
    multiplies_embedding,
    repeats_heads_in_layer,
    repeats_heads_in_sdpa,
)
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import rank_of, resolve_targets


@dataclass(frozen=True)
class LayerStyle:
    """Structure of a family's layer; sizes come from the architecture."""

    norm: Literal["rms", "float", "layer", "cohere"] = "rms"
    order: Literal["pre", "parallel", "sandwich", "post"] = "pre"
    head_norms: Literal["no", "head", "full"] = "no"
    rotary: bool = True
    rotates_halves: bool = True
    residual_scale: bool = False
    keeps_attention_output: bool = False


STYLES: dict[str, LayerStyle] = {
    "llama": LayerStyle(),
    "mistral": LayerStyle(),
    "qwen2": LayerStyle(),
    "smollm3": LayerStyle(),
    "qwen3": LayerStyle(head_norms="head"),
    "ernie4_5": LayerStyle(rotates_halves=False),
    "phi3": LayerStyle(),
    "gemma": LayerStyle(norm="float"),
    "gemma2": LayerStyle(norm="float", order="sandwich"),
    "gemma3": LayerStyle(norm="float", order="sandwich", head_norms="head"),
    "gemma3_text": LayerStyle(norm="float", order="sandwich", head_norms="head"),
    "mixtral": LayerStyle(),
    "qwen2_moe": LayerStyle(),
    "qwen3_moe": LayerStyle(head_norms="head"),
    "gpt_oss": LayerStyle(rotates_halves=False),
    "deepseek_v2": LayerStyle(),
    "granite": LayerStyle(residual_scale=True),
    "olmo2": LayerStyle(norm="float", order="post", head_norms="full"),
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
    "hunyuan_v1_dense": LayerStyle(head_norms="head"),
    "olmo3": LayerStyle(norm="float", order="post", head_norms="full"),
    "exaone4": LayerStyle(order="post", head_norms="head"),
    "cohere2": LayerStyle(norm="cohere", order="parallel"),
    "olmoe": LayerStyle(head_norms="full"),
    "phi": LayerStyle(norm="layer", order="parallel"),
    "gpt_neox": LayerStyle(norm="layer", order="parallel"),
    "falcon": LayerStyle(norm="layer", order="parallel"),
    "cohere": LayerStyle(norm="cohere", order="parallel"),
}
"""Families with an implemented layer; any other is replayed as Llama's and marked as approximate."""
GPT_2 = ("gpt2", "gpt_bigcode")
"""Families that apply dropout to the embedding too."""


@dataclass(frozen=True)
class Layout:
    """The model of one run: its resident tensors, and its layers in order."""

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
    loss_code: LossCode
    """Variant of the family's stock loss in the version of transformers that runs."""

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
    if execution.device == "cuda" and not flash_trains(execution.capability, architecture.head_dim):
        # SDPA chooses its memory-efficient kernel, sample by sample.
        attention: Kernel = "efficient" if execution.attention == "flash" else execution.attention
        execution = replace(execution, attention=attention, varlen=False)
    in_one_call = execution.varlen and not (softcap or sinks or architecture.attention_dropout)
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
        repeated_by=_repeated_by(architecture, execution),
        copied=execution.sdpa and copies_for_sdpa(execution.transformers),
    )
    experts: list[list[LinearModule]] = [[] for _ in range(architecture.layers)]
    for module in architecture.expert_modules:
        if module.layer is not None:
            experts[module.layer].append(module)
    known: dict[tuple[tuple[int, ...], Mixture | None], DecoderLayer] = {}
    """Layers by their modules, of which equal ones are the same object."""
    linear_cache: dict[tuple[object, ...], Linear] = {}
    routed = _mixture(recipe, architecture, execution)
    blocks = []
    shapes: list[tuple[int, ...]] = []
    expert_shapes: list[tuple[int, ...]] = []
    for modules, projections in zip(by_layer, experts, strict=True):
        linears = tuple(
            _linear(module, recipe, ranks.get(module.name, 0), linear_cache) for module in modules
        )
        for linear in linears:
            if linear.rank:
                shapes += [(linear.rank, linear.inputs), (linear.outputs, linear.rank)]
                shapes += [(linear.outputs,)] if linear.dora else []
        of_layer = None if any(linear.part == "mlp" for linear in linears) else routed
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
                norm=style.norm,
                order=style.order,
                two_norms=_layer_norms(architecture) > 1,
                activation=architecture.activation,
                gated=architecture.gated,
                intermediate=architecture.intermediate_size or 0,
                hidden=architecture.hidden_size,
                norm_itemsize=4 if execution.cast_to_float32 else execution.compute_itemsize,
                kernel=_kernel(architecture, execution),
                rotary=1.0 if style.rotary else 0.0,
                head_norms=style.head_norms,
                rotates_halves=style.rotates_halves,
                residual_scale=style.residual_scale,
                keeps_attention_output=style.keeps_attention_output,
                mixture=of_layer,
                dropout=architecture.residual_dropout,
            )
        blocks.append(known[key])
    lora_tensors = tuple(map(prod, shapes))
    shapes += expert_shapes
    shapes += vocabulary_shapes(recipe.lora, architecture)
    return Layout(
        blocks=tuple(blocks),
        tokens=rows * length,
        rows=rows,
        length=length,
        hidden=architecture.hidden_size,
        vocabulary=architecture.vocab_size,
        modifies_embedding=len(architecture.embeddings) > 1
        or multiplies_embedding(architecture.model_type, execution.transformers),
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
        loss_code=loss_code(architecture.model_type, execution.transformers),
    )


def vocabulary_shapes(lora: Lora, architecture: Architecture) -> list[tuple[int, ...]]:
    """Return the shape of what is trained of the embedding, rows or all, and of an untied head."""
    head = architecture.head
    rows = head.out_features if lora.train_embeddings else len(set(lora.trainable_tokens))
    return [(rows, head.in_features)] * (1 if head.tied else 2) if rows else []


def _kernel(architecture: Architecture, execution: ExecutionConfig) -> Kernel:
    """Return the attention kernel. Falcon passes SDPA one key head for all query heads, which no fused kernel
    supports; gpt-oss has no SDPA in transformers."""
    if architecture.model_type == "gpt_oss" and execution.sdpa:
        return "eager"
    shared = architecture.model_type == "falcon" and architecture.heads != architecture.kv_heads
    return "math" if shared and execution.attention in ("flash", "efficient") else execution.attention


def _repeated_by(architecture: Architecture, execution: ExecutionConfig) -> Literal["layer", "kernel", ""]:
    """Return where key and value heads are copied for the query heads that share them."""
    if execution.attention in ("flash", "efficient") and repeats_heads_in_layer(
        architecture.model_type, execution.transformers, sdpa=execution.sdpa
    ):
        return "layer"
    if execution.attention == "efficient" or (
        execution.sdpa and repeats_heads_in_sdpa(execution.transformers)
    ):
        return "kernel"
    return ""


def _layer_norms(architecture: Architecture) -> int:
    """Count the norms over the hidden state in the first layer."""
    wanted = (architecture.hidden_size,)
    norms = [p for p in architecture.parameters if p.layer == 0 and p.role == "norm" and p.shape == wanted]
    return sum(p.name.endswith(".weight") for p in norms)


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
        biased=any(p.role == "expert" and not p.is_expert_matrices for p in architecture.parameters),
    )


def _linear(
    module: LinearModule, recipe: Recipe, rank: int, linear_cache: dict[tuple[object, ...], Linear]
) -> Linear:
    """Return the module as the trainer holds it, with rank 0 where it is no target; equal ones are cached."""
    key = (
        module.kind,
        module.in_features,
        module.out_features,
        module.part,
        module.bias,
        module.quantizable,
        rank,
    )
    if key not in linear_cache:
        linear_cache[key] = Linear(
            name=module.kind,
            inputs=module.in_features,
            outputs=module.out_features,
            method=recipe.quantization.method if module.quantizable else "none",
            part=module.part,
            bias=module.bias,
            rank=rank,
            dora=recipe.lora.use_dora and rank > 0,
        )
    return linear_cache[key]
