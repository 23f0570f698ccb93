"""The optimizer of a run: its name in transformers, and LoRA+ in place of one rate for all matrices."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""transformers' name of each choice of ``training.optimizer``."""


def create_lora_plus(model: Any, arguments: TrainingArguments, ratio: float) -> Optimizer:
    """Return the optimizer of a run with ``training.lora_plus_ratio``: peft's groups, A's matrices first."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: Optimizer = create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
    return optimizer
