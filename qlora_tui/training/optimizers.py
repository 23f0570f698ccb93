"""The optimizer of a run: its name in transformers, and LoRA+ in place of one rate for all."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from qlora_tui.gpu.wsl import managed_memory_is_safe
from qlora_tui.recipe.schema import Training
from qlora_tui.training.trained_embeddings import embedding_rate, trained_matrices

OPTIMIZERS = {
    "auto": "paged_adamw_8bit",  # the least memory, where nothing chose for the free memory
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
}
"""transformers' name of each choice of ``training.optimizer``."""


def optimizer_class_and_options(arguments: TrainingArguments, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class of transformers' choice and its options, not paged where that is unsafe.

    The states then are in the GPU's own memory: the same values, from the same kernels.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if options.get("is_paged") and not managed_memory_is_safe():
        options["is_paged"] = False
    return optimizer_class, options


def reset_states(optimizer: Any) -> None:
    """Set the states of an optimizer to their initial values; they stay allocated."""
    on_host = []
    for state in optimizer.state.values():
        for name, value in state.items():
            # bitsandbytes' code tables are constants.
            if torch.is_tensor(value) and not name.startswith("qmap"):
                if value.device.type == "cpu":
                    on_host.append(value)
                else:
                    value.zero_()
            elif isinstance(value, int | float):
                state[name] = type(value)(0)
    wait_for_gpu()
    for value in on_host:
        value.zero_()


def wait_for_gpu() -> None:
    """Wait until the GPU has done all that was queued; call it before the CPU touches optimizer states.

    Paged ones are in managed memory: see :func:`~qlora_tui.gpu.wsl.managed_memory_is_safe`.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        torch.cuda.synchronize()


def create_optimizer(model: Any, arguments: TrainingArguments, training: Training) -> Optimizer | None:
    """Return the optimizer of a run; None where transformers creates it.

    With ``training.lora_plus_ratio`` the groups are peft's, A's matrices first; a trained embedding and head
    are the last group.
    """
    ratio = training.lora_plus_ratio
    matrices = trained_matrices(model)
    if ratio == 1 and not matrices:
        return None
    optimizer_class, options = optimizer_class_and_options(arguments, model)
    if ratio == 1:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        plain: Optimizer = optimizer_class(trained, weight_decay=arguments.weight_decay, **options)
        return _with_own_rate(plain, matrices, arguments, training)
    from peft.optimizers import create_loraplus_optimizer

    with_ratio: Optimizer = create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
    return _with_own_rate(with_ratio, matrices, arguments, training)


def _with_own_rate(
    optimizer: Optimizer, matrices: list[Any], arguments: TrainingArguments, training: Training
) -> Optimizer:
    """Move embedding and head into a last group with their rate; an optimizer that has done no step yet."""
    if matrices:
        moved = set(map(id, matrices))
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
        own = {"lr": embedding_rate(training), "weight_decay": arguments.weight_decay}
        optimizer.add_param_group({"params": matrices, **own})
    return optimizer
