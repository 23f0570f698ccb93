"""The architecture of a model, read from ``config.json`` by ``config_parser.parse_architecture``."""

from __future__ import annotations

from math import prod
from typing import Literal

from msgspec import Struct

from qlora_tui.errors import UserError

Part = Literal["attention", "mixer", "mlp", "shared_expert", "expert", "router", "vision", "other"]
"""Purpose of a linear module.

``mixer`` replaces attention in some layers of a hybrid model; ``expert`` is a projection of all routed
experts of a layer.
"""

Role = Literal["norm", "router", "expert", "conv", "vision", "other"]
"""The role of a parameter outside linear modules and embeddings."""


def inner_name(name: str) -> str:
    """Return the part of a module's name that begins at ``layers.``, such as ``layers.0.self_attn.q_proj``.

    A text model has the same inner names with and without the multimodal model around it. A name without
    ``layers.`` is returned unchanged.
    """
    _, separator, tail = name.partition("layers.")
    return separator + tail if separator else name


class LinearModule(Struct, frozen=True):
    """A linear module of the model, or one projection of all experts of a layer."""

    name: str
    """Full dotted name in the model: ``model.layers.0.self_attn.q_proj``."""
    kind: str
    """Last part of the name, which LoRA targets use: ``q_proj``."""
    part: Part
    layer: int | None
    """Index of the decoder layer (of the vision layer when ``part`` is ``vision``); None outside layers."""
    in_features: int
    out_features: int
    bias: bool
    quantizable: bool
    """Whether the weight is quantized; if not, it stays in the compute dtype.

    transformers decides this, except for weights that are ``read_directly``.
    """
    read_directly: bool = False
    """Whether the model's code itself reads the weight, which it cannot do in 4 or 8 bits."""
    conv1d: bool = False
    """Whether the module is GPT-2's ``Conv1D``, stored transposed and quantized like a Linear."""
    copies: int = 1
    """Number of matrices of this shape: one, or one per expert."""
    adaptable: bool = True
    """Whether LoRA can adapt the module.

    It cannot if the module computes more than a product (Llama 4's router), if code reads the weight instead
    of calling the module (Jamba's ``dt_proj``), or if kernels read the weight, which peft refuses (Mamba's
    ``out_proj``).
    """

    @property
    def weight_params(self) -> int:
        return self.in_features * self.out_features * self.copies

    @property
    def bias_params(self) -> int:
        return self.out_features if self.bias else 0


class Embedding(Struct, frozen=True):
    """A table of the language model, for tokens or learned positions. Never quantized."""

    name: str
    rows: int
    width: int

    @property
    def params(self) -> int:
        return self.rows * self.width


class OutputHead(Struct, frozen=True):
    """The output projection over the vocabulary. Never quantized."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    tied: bool
    """Whether the head shares its weight with the token embedding, so that the weight counts once."""

    @property
    def weight_params(self) -> int:
        """Return the number of parameters of the weight, tied or not."""
        return self.in_features * self.out_features

    @property
    def bias_params(self) -> int:
        return self.out_features if self.bias else 0

    @property
    def own_params(self) -> int:
        """Return the number of parameters that the head adds to the model. A tied weight is not counted."""
        return (0 if self.tied else self.weight_params) + self.bias_params


class Parameter(Struct, frozen=True):
    """A parameter outside linear modules and embeddings: a norm, a router, fused experts."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]

    @property
    def params(self) -> int:
        return prod(self.shape)

    @property
    def is_expert_matrices(self) -> bool:
        """Return whether the parameter holds a matrix of each expert, rather than their biases."""
        return self.role == "expert" and len(self.shape) == 3


class Experts(Struct, frozen=True):
    """The routed experts of a mixture, which are fused three-dimensional parameters."""

    count: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int | None
    """Width of the shared expert, which processes all tokens; None if there is none."""
    see_all_tokens: bool = False
    """Whether each expert processes all tokens, including those that are not routed to it (Llama 4)."""


class Architecture(Struct, frozen=True):
    """One model with all of its parameters, as transformers builds it for causal language modeling."""

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int | None
    """Width of the dense MLP; None if every layer is a mixture."""
    heads: int
    kv_heads: int
    head_dim: int
    """Width of one head of queries and keys."""
    vocab_size: int
    max_positions: int | None
    tied_head: bool
    activation: str
    """Activation, under its name in the config: ``silu``, ``gelu_pytorch_tanh``."""
    gated: bool
    """Whether the MLP multiplies two projections (gate and up)."""
    residual_dropout: float
    """Share of the outputs of attention and MLP that the model itself drops in training (GPT-2, OPT, Phi-2);
    usually 0.
    """
    attention_dropout: float
    """Share of the attention weights that the model itself drops in training (GPT-2, Granite 3); usually 0.
    """
    final_logit_softcapping: float | None
    logit_scale: float | None
    """Factor applied to the logits after the head; None for 1."""
    dtype: str | None
    """Dtype of the weights in the file: ``bfloat16``."""
    quantized_as: str | None
    """``quant_method`` of a checkpoint that is stored quantized: ``mxfp4``, ``awq``, ``bitsandbytes``."""
    experts: Experts | None
    modules: tuple[LinearModule, ...]
    """Every linear module except the head, in the model's order."""
    embeddings: tuple[Embedding, ...]
    head: OutputHead
    parameters: tuple[Parameter, ...]
    """All other parameters."""
    is_outline: bool = False
    """Whether this is an approximation from common keys of the config, until transformers' class is read."""
    attention_softcap: bool = False
    """Whether attention scores are capped before the softmax, which no fused kernel supports (Gemma 2)."""
    own_attention: bool = False
    """Whether the class does not call transformers' interface for attention.

    Such a class computes all scores in its own code (Falcon, Bloom), or has no attention.
    """
    index_heads: int = 0
    """Number of heads with which each token selects the tokens to attend to (DeepSeek V3.2).

    0 if each token attends to all earlier ones.
    """
    own_norms: bool = False
    """Whether the norms are LayerNorms that the class computes step by step in float32 (Cohere, OLMo)."""
    whole_logits: bool = False
    """Whether the logits of all tokens must be computed at once.

    They must if the decoder cannot be run without its head, or the head is not a linear module (Llama 4).
    """
    state_size: int = 0
    """Width of the state of each head of the recurrent layers (Mamba); 0 without recurrent layers."""
    chunk_size: int = 0
    """Number of tokens that the recurrent layers process at a time; 0 if it is unknown."""
    layer_runs: tuple[int, ...] = ()
    """For each layer, how many times a forward pass runs it and saves its tensors. Empty unless some layers
    run in a loop (HRM).
    """
    own_code: bool = False
    """Whether the class passes unusual tensors to attention, or cannot be tried on tensors without values.

    Inkling passes a bias for each pair of tokens; DBRX needs values.
    """
    keeps_activations: bool = False
    """Whether the class does not support gradient checkpointing (CTRL)."""
    saves_beyond_rules: float = 0.0
    """Largest relative difference between the bytes that a layer saves and those that :mod:`qlora_tui.memory`
    predicts.

    Measured in a trial of the class (``training/class_trial.py``).
    """

    @property
    def expert_modules(self) -> tuple[LinearModule, ...]:
        """Return each projection of each layer's experts, as a module that LoRA can adapt."""
        if self.experts is None:
            return ()
        widths = {"gate_up_proj": (self.hidden_size, 2 * self.experts.intermediate_size)}
        widths["down_proj"] = (self.experts.intermediate_size, self.hidden_size)
        return tuple(
            LinearModule(
                name=parameter.name,
                kind=f"experts.{projection}",
                part="expert",
                layer=parameter.layer,
                in_features=widths[projection][0],
                out_features=widths[projection][1],
                bias=False,
                quantizable=True,
                copies=parameter.shape[0],
            )
            for parameter in self.parameters
            if parameter.is_expert_matrices and (projection := parameter.name.rpartition(".")[2]) in widths
        )

    @property
    def targets(self) -> tuple[LinearModule, ...]:
        """Return all targets that LoRA can adapt: linear modules, then experts."""
        return (*(module for module in self.modules if module.adaptable), *self.expert_modules)

    @property
    def total_params(self) -> int:
        """Return the number of parameters as transformers counts them; a tied head counts once."""
        return (
            self.linear_params
            + self.linear_bias_params
            + self.embedding_params
            + self.head.own_params
            + sum(parameter.params for parameter in self.parameters)
        )

    @property
    def vision_params(self) -> int:
        """Return the number of parameters of the modules that read images."""
        modules = sum(m.weight_params + m.bias_params for m in self.modules if m.part == "vision")
        return modules + sum(parameter.params for parameter in self.parameters if parameter.role == "vision")

    @property
    def linear_params(self) -> int:
        """Return the number of weights of all linear modules except the head."""
        return sum(module.weight_params for module in self.modules)

    @property
    def linear_bias_params(self) -> int:
        return sum(module.bias_params for module in self.modules)

    @property
    def embedding_params(self) -> int:
        return sum(embedding.params for embedding in self.embeddings)

    @property
    def expert_params(self) -> int:
        """Return the number of parameters of the fused experts, including biases."""
        return sum(parameter.params for parameter in self.parameters if parameter.role == "expert")

    def kinds(self) -> tuple[str, ...]:
        """Return the distinct kinds of modules that LoRA can target by name, in the model's order."""
        adapted = (module for module in self.modules if module.part != "vision" and module.adaptable)
        return tuple(dict.fromkeys(module.kind for module in adapted))


_LEARNED_POSITION_TABLES = ("wpe", "embed_positions")


def context_length_warning(length: int, architecture: Architecture) -> UserError | None:
    """Return a warning if samples of ``length`` tokens exceed the model's context; None if they fit."""
    limit = architecture.max_positions
    if limit is None or length <= limit:
        return None
    learned_positions = any(
        table.name.endswith(_LEARNED_POSITION_TABLES) for table in architecture.embeddings
    )
    return UserError(
        "Longer than the model's context",
        what=f"Samples can be up to {length:,} tokens long, but the model's context is only {limit:,}.",
        why="The model has no embedding for later positions: a longer sample makes the run fail."
        if learned_positions
        else "The model was not trained on later positions, so longer samples will be learned poorly.",
        fix=f"Set the sequence length (data.max_length) to {limit:,} or less.",
    )
