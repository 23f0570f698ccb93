"""The learning-rate schedule of a run: transformers' own, without its first step of rate zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from qlora_tui.recipe.schema import Training

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "polynomial": "polynomial",
    "cosine_with_restarts": "cosine_with_restarts",
    "wsd": "warmup_stable_decay",
    "constant": "constant_with_warmup",
}
"""transformers' name of each choice of ``training.lr_scheduler``."""


def schedule_arguments(training: Training, steps: int) -> dict[str, Any]:
    """Return ``lr_scheduler_kwargs`` of ``TrainingArguments`` for a run of ``steps`` optimizer steps."""
    match training.lr_scheduler:
        case "cosine_with_restarts":
            return {"num_cycles": training.lr_cycles}
        case "polynomial":
            return {"power": training.lr_power, "lr_end": 0.0}
        case "wsd":
            after_warmup = steps - math.ceil(training.warmup_ratio * steps)
            decay = min(round(training.lr_decay_share * steps), after_warmup)
            # 1-sqrt ended lowest of the shapes compared in arXiv 2405.18392, section 3.
            return {"num_decay_steps": decay, "decay_type": "1-sqrt"}
        case _:
            return {}


def create_schedule(optimizer: Optimizer, arguments: TrainingArguments, steps: int) -> LambdaLR:
    """Return the schedule of a run of ``steps`` optimizer steps; see :func:`schedule_arguments`.

    The warm-up is shifted by one, so that the rate of the first step is not zero.
    """
    warmup = arguments.get_warmup_steps(steps)
    total = max(steps, warmup + 1)  # the polynomial divides by the steps after the warm-up
    specific: Any = arguments.lr_scheduler_kwargs
    stock: Any = get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, total, specific)
    return LambdaLR(optimizer, [partial(_shifted_warmup, share, warmup) for share in stock.lr_lambdas])


def _shifted_warmup(share_at: Callable[[int], float], warmup: int, step: int) -> float:
    """Return the share of the peak learning rate at ``step``, which counts from 0."""
    return share_at(step + 1 if step < warmup else step)
