"""The optimizer of a run, LoRA+, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from qlora_tui.gpu.torch_env import managed_memory_is_safe
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training.embeddings import embedding_rate, trained_matrices

_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of parameters without weight decay, as in transformers' ``Trainer``."""

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "polynomial": "polynomial",
    "cosine_with_restarts": "cosine_with_restarts",
    "wsd": "warmup_stable_decay",
    "constant": "constant_with_warmup",
}
"""transformers' name of each choice of ``training.lr_scheduler``."""


def create_optimizer(model: Any, training: Training) -> Optimizer:
    """Return the optimizer of a run, with the options of transformers' ``Trainer``.

    If ``training.lora_plus_ratio`` is not 1, the parameter groups are those of peft's LoRA+, with the A
    matrices first. A trained embedding and head are the last group.
    """
    optimizer_class, options = _class_and_options(training)
    options["lr"] = training.learning_rate
    matrices = trained_matrices(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer: Optimizer
    if training.lora_plus_ratio != 1:
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(
            model,
            optimizer_class,
            loraplus_lr_ratio=training.lora_plus_ratio,
            loraplus_weight_decay=training.weight_decay,
            **options,
        )
    elif matrices:
        optimizer = optimizer_class(list(trained.values()), weight_decay=training.weight_decay, **options)
    else:
        decayed = set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))  # type: ignore[no-untyped-call]
        groups = [
            {
                "params": [p for name, p in trained.items() if (name in decayed) == decays],
                "weight_decay": decay,
            }
            for decays, decay in ((True, training.weight_decay), (False, 0.0))
        ]
        return optimizer_class(groups, **options)  # type: ignore[no-any-return]
    if matrices:
        moved = set(map(id, matrices))
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
        own = {"lr": embedding_rate(training), "weight_decay": training.weight_decay}
        optimizer.add_param_group({"params": matrices, **own})
    return optimizer


def _class_and_options(training: Training) -> tuple[Any, dict[str, Any]]:
    """Return the class of the recipe's optimizer, and its options."""
    import bitsandbytes.optim
    from transformers.optimization import Adafactor

    # If not paged, the states are in the GPU's own memory: the same values, from the same kernels.
    paged = {"is_paged": managed_memory_is_safe()}
    adamw, lion = bitsandbytes.optim.AdamW, bitsandbytes.optim.Lion
    of_lion = {"betas": _ADAM["betas"], "is_paged": False}
    match training.optimizer:
        case "adamw":
            return torch.optim.AdamW, {**_ADAM, "fused": True}
        case "adamw_8bit":
            return adamw, {**_ADAM, "optim_bits": 8, "is_paged": False}
        case "paged_adamw_32bit":
            return adamw, {**_ADAM, "optim_bits": 32, **paged}
        case "auto" | "paged_adamw_8bit":  # the least memory, if nothing has been chosen for the free memory
            return adamw, {**_ADAM, "optim_bits": 8, **paged}
        case "lion":
            return lion, {**of_lion, "optim_bits": 32}
        case "lion_8bit":
            return lion, {**of_lion, "optim_bits": 8}
        case "adafactor":
            return Adafactor, {"scale_parameter": False, "relative_step": False}


def wait_for_gpu() -> None:
    """Wait until the GPU has finished all queued work; call this before the CPU touches optimizer states.

    Paged states are in managed memory: see :func:`~qlora_tui.gpu.torch_env.managed_memory_is_safe`.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        torch.cuda.synchronize()


def warmup_steps(training: Training, steps: int) -> int:
    """Return the number of steps in which the learning rate rises, in a run of ``steps`` steps."""
    return math.ceil(steps * training.warmup_ratio)


def create_schedule(optimizer: Optimizer, training: Training, steps: int) -> LambdaLR:
    """Return transformers' schedule for a run of ``steps`` optimizer steps, without its initial rate of zero.

    To skip the zero, the warm-up is shifted by one step.
    """
    warmup = warmup_steps(training, steps)
    total = max(steps, warmup + 1)  # the polynomial divides by the steps after the warm-up
    name: Any = SCHEDULES[training.lr_scheduler]
    stock: Any = get_scheduler(name, optimizer, warmup, total, _schedule_options(training, steps))
    return LambdaLR(optimizer, [partial(_shifted_warmup, share, warmup) for share in stock.lr_lambdas])


def _schedule_options(training: Training, steps: int) -> dict[str, Any]:
    """Return the ``scheduler_specific_kwargs`` of transformers for the recipe's schedule."""
    match training.lr_scheduler:
        case "cosine_with_restarts":
            return {"num_cycles": training.lr_cycles}
        case "polynomial":
            return {"power": training.lr_power, "lr_end": 0.0}
        case "wsd":
            decay = min(round(training.lr_decay_share * steps), steps - warmup_steps(training, steps))
            # Of the shapes compared in arXiv 2405.18392, section 3, 1-sqrt gave the lowest final loss.
            return {"num_decay_steps": decay, "decay_type": "1-sqrt"}
        case _:
            return {}


def _shifted_warmup(share_at: Callable[[int], float], warmup: int, step: int) -> float:
    """Return the share of the peak learning rate at ``step``, which counts from 0."""
    return share_at(step + 1 if step < warmup else step)


def change_rate(schedule: Any, value: float, training: Training, *, step: int, steps: int) -> None:
    """Change the learning rate of the remaining steps. Its schedule keeps the same shape.

    ``value`` is the new rate of the next step. During warm-up, and in a schedule with restarts, it is the new
    peak rate instead. With LoRA+ it is the rate of the A matrices, and the B matrices keep their ratio to it.
    Nothing is changed if the rate has already reached 0.

    Args:
        step: index of the next step, counted from 0.
        steps: number of steps in the run.
    """
    share = schedule.get_last_lr()[0] / schedule.base_lrs[0]
    if share <= 0:
        return
    to_the_peak = step < warmup_steps(training, steps) or training.lr_scheduler == "cosine_with_restarts"
    factor = (value if to_the_peak else value / share) / schedule.base_lrs[0]
    schedule.base_lrs = [base * factor for base in schedule.base_lrs]
    schedule._last_lr = [base * share for base in schedule.base_lrs]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
