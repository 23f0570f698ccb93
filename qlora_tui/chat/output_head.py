"""A model's output layer: its inputs at given positions, and the logits that it computes from them.

An input has as many numbers as the model is wide, hundredths of the logits, so that the logits of thousands
of positions can be kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 256
"""Rows of the matrix that are computed at once."""


class ModelHead:
    """The layer that computes logits, and what the model does with them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config.get_text_config()
        self.scale = float(
            getattr(config, "logit_scale", None)
            or getattr(config, "lm_head_multiplier", None)
            or 1 / (getattr(config, "logits_scaling", None) or 1)
        )
        """Factor of the logits."""
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
        """Bound c of logits c·tanh(x/c); 0 for none."""

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
        """Yield the layer's matrix, adapter included, in blocks of rows (rows, vocabulary).

        Inputs (positions, width) times the matrix (width, vocabulary) are the logits before scale and cap.
        ``like`` has the dtype and device of the inputs.
        """
        identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        for start in range(0, len(identity), _BLOCK):
            yield self._apply(identity[start : start + _BLOCK]).to(like.dtype)

    def _apply(self, inputs: Tensor) -> Tensor:
        layer = self._model.get_output_embeddings()
        result: Tensor = layer(inputs[None])[0].float()
        return result
