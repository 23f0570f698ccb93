"""The routed experts of a layer, as the estimate replays them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one layer."""

    experts: int
    per_token: int
    hidden: int
    intermediate: int
    activation: str
    clamped: bool = False
    """Whether the experts follow gpt-oss: both halves clamped, a scaled sigmoid gate, and biases."""
    wide_weights: bool = False
    """Whether routing weights stay float32 (Mixtral, DeepSeek), and so do their products."""
    separate: bool = False
    """Whether each expert's matrices are separate modules (transformers 4)."""
    method: str = "none"
    """Quantization of separate experts."""
    expert_method: str = "none"
    """Quantization of fused experts."""
    biased: bool = False
    """Whether fused experts have biases."""
    ranks: tuple[int, ...] = ()
    """Ranks of the adapters on gate and up, and on down, of fused experts; 0 without."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether our own function computes them."""
        return self.expert_method != "none" or any(self.ranks)
