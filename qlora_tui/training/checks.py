"""Proving on the model at hand what must hold before training may rely on it.

Two short forward passes each. Families differ in ways no list keeps up with: a convolution that looks across
samples, a factor between head and loss. What does not hold is not used, and the run's record says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_tui.training.loss import Head

_FIRST, _SECOND = 9, 7
"""Lengths of the two samples."""
_LEAK = 1e-3
"""Share of the outputs' spread by which the second sample may move when the first changes. It is 0 for
every path that keeps them apart but 8-bit ones, where outliers of one row are scaled with another's."""
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Share of the outputs' spread by which two ways to the same result may differ, by dtype."""


@torch.no_grad()
def samples_are_kept_apart(model: nn.Module, device: torch.device) -> bool:
    """Whether a sample's outputs in a packed row are its own: as alone, whatever lies before it."""
    first, other, second = _tokens(model, device)
    with _evaluating(model):
        try:
            packed = _second_in_row(model, first, second)
            packed_after_other = _second_in_row(model, other, second)
            alone = model(input_ids=second, position_ids=_positions(second), segments=[_SECOND]).logits[0]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    return (
        _differ(packed, packed_after_other) <= _LEAK
        and _differ(packed, alone) <= _TOLERANCES[model_dtype(model)]
    )


@torch.no_grad()
def loss_is_exact(model: nn.Module, head: Head, device: torch.device) -> bool:
    """Whether the head as read from the configuration gives the model's own logits."""
    first, _, _ = _tokens(model, device)
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # a PreTrainedModel's method
    with _evaluating(model):
        own = model(input_ids=first, use_cache=False).logits[0]
        hidden = decoder(input_ids=first, use_cache=False)[0]
        try:
            ours = head.logits(hidden[0])
        except RuntimeError:
            return False
    return ours.shape == own.shape and _differ(ours, own) <= _TOLERANCES[model_dtype(model)]


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of the output head: the dtype the model computes in."""
    weight: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]  # a PreTrainedModel's method
    return weight.dtype


def _tokens(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two first samples that differ everywhere, and a second one."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]  # a config
    first = torch.randint(vocabulary, (1, _FIRST), generator=generator)
    second = torch.randint(vocabulary, (1, _SECOND), generator=generator)
    other = (first + vocabulary // 2) % vocabulary
    return first.to(device), other.to(device), second.to(device)


def _second_in_row(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([_positions(first), _positions(second)], dim=1)
    logits: Tensor = model(input_ids=row, position_ids=positions, segments=[_FIRST, _SECOND]).logits
    return logits[0, _FIRST:]


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def _differ(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a share of the spread of ``other``; infinite where either is not finite."""
    one, other = one.float(), other.float()
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    return float((one - other).abs().max() / other.std().clamp(min=1e-6))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
