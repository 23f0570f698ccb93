"""LoRA on top of the frozen model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    with names_as_they_are(model, config.target_modules):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    use_lean_lora(adapted)
    return adapted


@contextmanager
def names_as_they_are(model: nn.Module, names: Iterable[str] | str) -> Iterator[None]:
    """While peft puts an adapter on, let it touch the modules named and no others.

    For adapters made before transformers 5, peft reads ``gate_proj`` and its like as the routed experts in
    families that have such (``_convert_peft_config_moe``), also at the end of the full name of a shared
    expert's or a dense layer's module. Names that are all modules of this model need no such reading.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a peft, or with it a transformers, that does not do this
        yield
        return
    there = {name for name, _ in model.named_modules()}
    kept = conversion.convert_peft_config_for_transformers
    if not isinstance(names, str) and there.issuperset(names):
        conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = kept


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
