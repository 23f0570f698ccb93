"""An adapter's updates of experts, taken apart into updates of single matrices.

peft stacks the factors of all experts of a layer (``ParamWrapper`` in ``tuners/lora/layer.py``), and names
them by the module that holds the parameters, not by the parameter. The weight files of most families have a
tensor for each expert and projection, those of others one for all experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_tui.training.experts.routing import PROJECTIONS, columns_of_b, rows_of_a

MATRICES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Names of an expert's matrices in weight files, by the parameter that holds those of all experts. The
matrices of one tuple are below each other in it."""
_WRAPPER = ".base_layer"
GRANITE = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}
"""Names of the parameters of all experts in Granite's weight files, in place of ``experts.`` and theirs."""


def expert_parameter(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the parameter of experts that the factors under ``name`` adapt; None for those of a module.

    Args:
        name: a name in the adapter's weights, such as ``model.layers.0.mlp.experts.base_layer``.
        config: the adapter's config.
    """
    path, depth = name.replace(_WRAPPER, ""), name.count(_WRAPPER)
    targets = config.get("target_parameters") or ()
    adapted = [p for p in PROJECTIONS if any(f".{path}.{p}".endswith(f".{target}") for target in targets)]
    # peft wraps the parameters in the model's order: the last one is outermost.
    return f"{path}.{adapted[-1 - depth]}" if depth < len(adapted) else None


@dataclass(frozen=True)
class StoredExperts:
    """Where the weight files have the matrices of a parameter of experts."""

    fused: str = ""
    """Name of the tensor of all experts; empty where each expert has its own."""
    transposed: bool = False
    """Whether matrices are stored as (inputs, outputs)."""
    matrices: tuple[tuple[str, ...], ...] = ()
    """Names of the tensors of each expert, which are below each other in the parameter."""


def stored_experts(parameter: str, names: Collection[str], experts: int) -> StoredExperts | None:
    """Find the tensors of a parameter of experts, such as ``model.layers.0.mlp.experts.gate_up_proj``.

    ``names`` are those of all tensors in the weight files. None where they do not have it.
    """
    path, _, projection = parameter.rpartition(".")
    granite = f"{path.removesuffix('experts')}{GRANITE[projection]}"
    for fused in (parameter, granite):
        if fused in names:
            # Only gpt-oss has biases, and matrices of (inputs, outputs).
            return StoredExperts(fused, transposed=f"{parameter}_bias" in names)
    for holder in (path, path.replace(".mlp.", ".block_sparse_moe.")):
        for parts in MATRICES[projection]:
            matrices = tuple(
                tuple(f"{holder}.{expert}.{part}.weight" for part in parts) for expert in range(experts)
            )
            if all(name in names for each in matrices for name in each):
                return StoredExperts(matrices=matrices)
    return None


@dataclass(frozen=True)
class ExpertDelta:
    """LoRA update of one projection of all experts of a layer."""

    down: Tensor
    """A: (experts · rank, inputs)."""
    up: Tensor
    """B: (outputs, rank · experts)."""
    experts: int
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of all matrices: (experts, outputs, inputs)."""
        return self.experts, len(self.up), self.down.shape[1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the update belongs to one tensor; it has to be taken apart first."""
        return False

    def apply_to(self, weight: Tensor) -> Tensor:
        """Refuse: it has to be taken apart first."""
        raise NotImplementedError("an update of experts that was not taken apart")

    def change_of(self, expert: int) -> Tensor:
        """Compute s·B·A of one expert, in fp32: (outputs, inputs)."""
        a, b = self.factors_of(expert)
        return b.float() @ a.float() * self.scale

    def factors_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return A (rank, inputs) and B (outputs, rank) of one expert."""
        return rows_of_a(self.down, self.experts)[expert], columns_of_b(self.up, self.experts)[expert]


@dataclass(frozen=True)
class FusedExpertDelta:
    """LoRA update of a tensor that holds the matrices of all experts."""

    delta: ExpertDelta
    transposed: bool
    """Whether a matrix is stored as (inputs, outputs), as in gpt-oss."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of the tensor as stored."""
        outputs, inputs = len(self.delta.up), self.delta.down.shape[1]
        return (self.delta.experts, *((inputs, outputs) if self.transposed else (outputs, inputs)))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the update belongs to a tensor of this shape."""
        return shape == self.shape

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the merged tensor, in the dtype of ``weight``; each expert is computed in fp32."""
        merged = weight.clone()
        for expert in range(self.delta.experts):
            change = self.delta.change_of(expert)
            merged[expert] = (weight[expert].float() + (change.T if self.transposed else change)).to(
                weight.dtype
            )
        return merged
