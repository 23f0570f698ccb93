"""Eval mode for a part of a training run: validation, samples, references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_grad_eval(model: Any) -> Iterator[None]:
    """Use eval mode without gradients inside, and restore the mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def frozen_eval(model: Any) -> Iterator[None]:
    """Use eval mode inside, with nothing to train and so nothing to save, and restore both.

    Gradients stay enabled where they are: the model computes as in a training step, which without them it
    does not to the last bit (norms, gated MLPs, the padding of attention).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    # transformers makes what the embedding returns require a gradient, for checkpointing.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.detach())
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
