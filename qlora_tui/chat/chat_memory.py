"""Whether the memory that a chat takes is free. Loads no torch."""

from __future__ import annotations

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.errors import UserError
from qlora_tui.memory import Device, estimate
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe

_ONE_CONVERSATION = {
    "data.max_length": 2048,
    "training.micro_batch_size": 1,
    "training.gradient_accumulation": 1,
    "training.gradient_checkpointing": "on",
}


def chat_fits(recipe: Recipe, device: Device, free_bytes: int) -> bool:
    """Whether a chat with the model of ``recipe`` fits into the free memory; False where that is unknown.

    One training step on one conversation takes more than answering it: besides the model and the keys and
    values of each layer, it needs gradients and optimizer states.
    """
    for path, value in _ONE_CONVERSATION.items():
        recipe = replace_setting(recipe, path, value)
    try:
        architecture = resolve_model(recipe.model.id).architecture
        return estimate(recipe, architecture, device=device).band.high_bytes <= free_bytes
    except UserError:
        return False
