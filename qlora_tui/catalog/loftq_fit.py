"""Whether an adapter of a model can start with LoftQ: its 16-bit weights must be known, one by one."""

from __future__ import annotations

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import resolve_targets


def require_loftq_base(lora: Lora, architecture: Architecture) -> None:
    """Raise UserError where the recipe starts with LoftQ, and there is no rounding error to start from."""
    if lora.init_weights != "loftq":
        return
    targets = resolve_targets(lora, architecture.targets)
    why = ""
    if architecture.quantized_as is not None:
        stored = architecture.quantized_as
        why = f"The weights are stored quantized ({stored}), so the 16-bit ones are not known."
    elif any(module.part == "expert" for module in targets):
        why = "lora.target_modules names experts, whose matrices peft stacks into one."
    elif any(module.conv1d for module in targets):
        why = "The model stores its weights transposed (Conv1D)."
    if why:
        raise UserError(
            "LoftQ cannot start this adapter",
            what=f'lora.init_weights is "loftq". {why}',
            fix='Set lora.init_weights = "random" or "eva".',
            exit_code=EXIT_USAGE,
        )
