"""The layer that computes logits, and the comparison of a chat's first logits with those of the libraries.

An input of this layer has as many numbers as the model is wide, about a hundredth of the size of the logits.
Inputs of thousands of positions can therefore be stored, and their logits computed when needed.

The chat reads a prompt into its own cache, adds adapters, groups heads and calls 4-bit kernels directly. The
check runs the end of a real prompt through both this code and the libraries' own. The logits of the next
token must agree as closely as the library agrees with itself when each module's output is perturbed by the
rounding error of the dtype (see :mod:`qlora_tui.training.checks.step_comparison`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.chat.adapters import LoraForward, TokenRowsForward, WholeModuleForward
from qlora_tui.chat.cpu import DirectForward
from qlora_tui.training.checks.rounding import NOISE_FACTOR, rounding_noise
from qlora_tui.training.fused.patching import PatchedForwards

_BLOCK = 256
"""Number of rows of the matrix that are computed at once."""


class ModelHead:
    """The layer that computes logits, and the scale and cap that the model applies to its output."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config.get_text_config()
        self.scale = float(
            getattr(config, "logit_scale", None)
            or getattr(config, "lm_head_multiplier", None)
            or 1 / (getattr(config, "logits_scaling", None) or 1)
        )
        """Factor by which the model multiplies the logits."""
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
        """Bound c if the model limits logits to c·tanh(x/c); 0 if it does not."""

    @torch.inference_mode()
    def inputs_of(self, compute: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """Run the model, and return the layer's inputs (positions, width) and the first logits (vocabulary,).

        ``compute`` runs the model on one row and returns its output. The layer itself computes only the first
        position.
        """
        inputs: list[Tensor] = []

        def keep_first(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            inputs.append(arguments[0])
            return (arguments[0][:, :1],)

        # Looked up here: an adapter may replace the layer.
        hook = self._model.get_output_embeddings().register_forward_pre_hook(keep_first)
        try:
            output = compute()
        finally:
            hook.remove()
        return inputs[0][0], output.logits[0, 0]

    @torch.inference_mode()
    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits (positions, vocabulary), float32, of inputs (positions, width)."""
        logits = self._apply(inputs) * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.inference_mode()
    def matrix(self, like: Tensor) -> Iterator[Tensor]:
        """Yield the layer's matrix (width, vocabulary), including the adapter, in blocks of rows.

        Inputs (positions, width) times this matrix are the logits before scale and cap. ``like`` has the
        dtype and device of the inputs.
        """
        identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        for start in range(0, len(identity), _BLOCK):
            yield self._apply(identity[start : start + _BLOCK]).to(like.dtype)

    def _apply(self, inputs: Tensor) -> Tensor:
        layer = self._model.get_output_embeddings()
        result: Tensor = layer(inputs[None])[0].float()
        return result


TOKENS = 16
"""Number of tokens at the end of the prompt that are compared. This costs little more than generating one
token.
"""


@dataclass(frozen=True)
class LogitsComparison:
    """Difference between the chat's logits and the library's."""

    difference: float
    """Root mean square difference over the vocabulary, relative to the logits' standard deviation."""
    noise: float
    """Difference that rounding alone makes to the library's logits, in the same unit."""

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor, noise: float = 0.0) -> LogitsComparison:
        """Compare logits (rows, vocabulary) with the expected ones."""
        expected = expected.float()
        spread = float((expected - expected.mean(-1, keepdim=True)).norm()) or 1.0
        return cls(float((logits.float() - expected).norm()) / spread, noise)

    @property
    def agrees(self) -> bool:
        """Return whether rounding explains the difference. False if a logit is not finite."""
        return self.difference <= NOISE_FACTOR * self.noise


def compare_logits(
    model: Any, dtype: torch.dtype, ours: Callable[[], Tensor], library: Callable[[], Tensor]
) -> LogitsComparison:
    """Compare two implementations of the same logits (rows, vocabulary).

    Args:
        model: The model, which runs transformers and peft alone during ``library``.
        dtype: Compute dtype of the model.
        ours: Returns the logits of this chat.
        library: Returns the logits of transformers and peft.
    """
    expected = library()
    comparison = LogitsComparison.of(ours(), expected)
    noise = rounding_noise(
        model,
        dtype,
        lambda: LogitsComparison.of(library(), expected).difference,
        comparison.difference,
    )
    return replace(comparison, noise=noise)


@contextmanager
def library_code(model: nn.Module) -> Iterator[None]:
    """Make the model compute with transformers and peft alone inside the block."""
    replaced = _replaced(model)
    experts = PatchedForwards(model, "experts")
    try:
        use_library_code(model)
        yield
    finally:
        for module, forward in replaced.items():
            vars(module)["forward"] = forward
        experts.use_ours()


def use_library_code(model: nn.Module) -> None:
    """Make the model compute with transformers and peft alone from now on."""
    for module in _replaced(model):
        vars(module).pop("forward")
    PatchedForwards(model, "experts").use_reference()


def _replaced(model: nn.Module) -> dict[nn.Module, Any]:
    return {
        module: forward
        for module in model.modules()
        if isinstance(
            forward := vars(module).get("forward"),
            LoraForward | TokenRowsForward | WholeModuleForward | DirectForward,
        )
    }
