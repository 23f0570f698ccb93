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
