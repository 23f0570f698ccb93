"""LoRA on top of the frozen model."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_tui.catalog.facts import Architecture
from qlora_tui.errors import Problem
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import select
from qlora_tui.training.lean import use_lean_lora


def add_lora(model: Any, settings: Lora, architecture: Architecture) -> Any:
    """The model with an adapter that changes nothing yet. Draws from torch's random numbers.

    Weights of the adapter are fp32 whatever the model computes in.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        # A whole number is written as one: other programs read it as an int.
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_names(model, settings, architecture),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    use_lean_lora(adapted)
    return adapted


def target_names(model: nn.Module, settings: Lora, architecture: Architecture) -> list[str]:
    """Full names, as this model has them, of the modules the recipe targets. Raises Problem."""
    there = dict(model.named_modules())
    by_tail = {_tail(name): name for name in there}
    names = []
    for module in select(settings.target_modules, architecture.modules):
        # A text model taken out of a multimodal one lacks the outer part of the name.
        name = module.name if module.name in there else by_tail.get(_tail(module.name))
        if name is None:
            raise Problem(
                "A target is not in the model",
                what=f"lora.target_modules leads to {module.name}, which the loaded model does not have.",
                why="The model as loaded differs from what its config.json says.",
                fix="Name kinds of modules that it has, such as q_proj.",
            )
        names.append(name)
    return names


def trained_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _tail(name: str) -> str:
    """From ``layers.`` on: ``layers.0.self_attn.q_proj``."""
    _, found, tail = name.partition("layers.")
    return found + tail if found else name
