"""The random numbers that a step draws from: remembered, so that a step given up can be done again."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch


class RandomNumberState(NamedTuple):
    """The random numbers that a checkpoint stores, at one moment."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    """Of the training device; None on the CPU."""

    @classmethod
    def capture(cls, device: torch.device) -> RandomNumberState:
        """The state now, without waiting for the device."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        """Draw the same random numbers again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
