"""NEFTune: uniform noise on the embeddings of a training step (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds noise to the output of a model's embedding, inside :meth:`scaled_for` only.

    So answers, evaluations and the checks before the first step see none. The noise comes from torch's
    random numbers, which checkpoints hold: a resumed run draws the same.

    Args:
        model: the model to train, with or without its adapter.
        alpha: the noise of a sample of L tokens of width H is uniform within alpha / √(L·H) (section 3).
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self._alpha = alpha
        self._magnitude: Tensor | None = None
        """Largest noise of each sequence or token, which broadcasts to (sequences, tokens, 1)."""
        if alpha:
            model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def scaled_for(self, batch: dict[str, Any]) -> Iterator[None]:
        """Add noise for the lengths of these samples; see :func:`qlora_tui.training.batches.collate`."""
        if self._alpha:
            self._magnitude = self._alpha / _lengths(batch).float().sqrt()
        try:
            yield
        finally:
            self._magnitude = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._magnitude is None:
            return None
        magnitude = (self._magnitude / output.shape[-1] ** 0.5).to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1).mul_(magnitude)


def _lengths(batch: dict[str, Any]) -> Tensor:
    """Length of the sample of each token (1, tokens, 1), or of each padded sequence (sequences, 1, 1)."""
    if "segments" not in batch:
        padded: Tensor = batch["attention_mask"].sum(1)[:, None, None]
        return padded
    lengths = torch.tensor(batch["segments"])
    of_tokens = lengths.repeat_interleave(lengths)[None, :, None]
    return of_tokens.to(batch["input_ids"].device, non_blocking=True)
