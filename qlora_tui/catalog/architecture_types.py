"""The architecture of a model, read from ``config.json`` by ``config_parser.parse_architecture``."""

from __future__ import annotations

from math import prod
from typing import Literal

from msgspec import Struct

Part = Literal["attention", "mixer", "mlp", "shared_expert", "router", "vision", "other"]
"""What a linear module is for. ``mixer``: what stands in for attention in a hybrid's other layers."""

Role = Literal["norm", "router", "expert", "conv", "vision", "other"]
"""The role of a parameter outside linear modules and embeddings."""


class LinearModule(Struct, frozen=True):
    """A linear layer that LoRA can adapt."""

    name: str
    """The model's own full dotted name: ``model.layers.0.self_attn.q_proj``."""
    kind: str
    """The last part of the name, by which LoRA targets it: ``q_proj``."""
    part: Part
    layer: int | None
    """Index of the decoder layer (of the vision layer when ``part`` is ``vision``); None outside layers."""
    in_features: int
    out_features: int
    bias: bool
    quantizable: bool
    """bitsandbytes replaces it. False stays in 16 bits, whatever the recipe says."""
    conv1d: bool = False
    """GPT-2's ``Conv1D``: the weight is stored transposed; bitsandbytes replaces it like a Linear."""

    @property
    def weight_params(self) -> int:
        return self.in_features * self.out_features

    @property
    def bias_params(self) -> int:
        return self.out_features if self.bias else 0


class Embedding(Struct, frozen=True):
    """A table of the language model: tokens or learned positions. Never quantized."""

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
    """Shares its weight with the token embedding, which then counts once."""

    @property
    def weight_params(self) -> int:
        """Parameters of the weight, tied or not."""
        return self.in_features * self.out_features

    @property
    def bias_params(self) -> int:
        return self.out_features if self.bias else 0

    @property
    def own_params(self) -> int:
        """Parameters it adds to the model: no weight when tied."""
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


class Experts(Struct, frozen=True):
    """The routed experts of a mixture: fused 3-D parameters, which bitsandbytes leaves in 16 bits."""

    count: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int | None
    """Width of the expert every token passes, where there is one."""


class Architecture(Struct, frozen=True):
    """One model, to the last parameter, as transformers builds it for causal language modelling."""

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int | None
    """Of the dense MLP; None where every layer is a mixture."""
    heads: int
    kv_heads: int
    head_dim: int
    """Of queries and keys."""
    vocab_size: int
    max_positions: int | None
    tied_head: bool
    activation: str
    """As the file names it: ``silu``, ``gelu_pytorch_tanh``."""
    gated: bool
    """The MLP multiplies two projections (gate and up)."""
    residual_dropout: float
    """Share of each half's output that the model itself drops in training (GPT-2, OPT, Phi-2); mostly 0."""
    final_logit_softcapping: float | None
    logit_scale: float | None
    """What the logits are multiplied by after the head, where that is not 1."""
    dtype: str | None
    """Of the weights in the file: ``bfloat16``."""
    quantized_as: str | None
    """``quant_method`` of a checkpoint that is stored quantised: ``mxfp4``, ``awq``, ``bitsandbytes``."""
    experts: Experts | None
    modules: tuple[LinearModule, ...]
    """Every linear module but the head, in the model's order."""
    embeddings: tuple[Embedding, ...]
    head: OutputHead
    parameters: tuple[Parameter, ...]
    """Everything else."""

    @property
    def total_params(self) -> int:
        """Equal to transformers' own count; a tied head counts once."""
        return (
            self.linear_params
            + self.linear_bias_params
            + self.embedding_params
            + self.head.own_params
            + sum(parameter.params for parameter in self.parameters)
        )

    @property
    def linear_params(self) -> int:
        """Weights of all linear modules but the head."""
        return sum(module.weight_params for module in self.modules)

    @property
    def linear_bias_params(self) -> int:
        return sum(module.bias_params for module in self.modules)

    @property
    def quantizable_params(self) -> int:
        """Weights that become 4-bit (or 8-bit) when the model is loaded quantised."""
        return sum(module.weight_params for module in self.modules if module.quantizable)

    @property
    def embedding_params(self) -> int:
        return sum(embedding.params for embedding in self.embeddings)

    @property
    def expert_params(self) -> int:
        """Of the fused experts, their biases included."""
        return self.role_params("expert")

    def role_params(self, role: Role) -> int:
        return sum(parameter.params for parameter in self.parameters if parameter.role == role)

    def kinds(self) -> tuple[str, ...]:
        """The distinct module kinds, in the model's order: what LoRA can target by name."""
        return tuple(dict.fromkeys(module.kind for module in self.modules))
