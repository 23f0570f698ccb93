"""Totals of the selected modules and rank: parameters, file size, memory, differences from the preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from msgspec import structs
from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_count
from qlora_tui.memory import Device, Estimate, estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import precision_of
from qlora_tui.memory.layers import vocabulary_shapes
from qlora_tui.recipe.diff import diff_recipes, format_value
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import alpha_of, match_modules, rank_of
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.lora.module_table import adapter_parameters
from qlora_tui.tui.workbench import Workbench

SAVED_BYTES = 4
"""Bytes of a parameter in ``adapter_model.safetensors``: adapters are trained and saved in 32 bits."""
_MAX_LINES = 2
"""Lines for the differences from the preset."""


@dataclass(frozen=True)
class MemoryDeltas:
    """Memory differences of a training step that need another estimate, in bytes."""

    dora_bytes: int
    """DoRA on, compared with off."""
    preset_bytes: int
    """The recipe's LoRA settings, compared with the preset's."""


def memory_deltas(
    recipe: Recipe, base: Recipe, architecture: Architecture, device: Device
) -> MemoryDeltas | None:
    """Compute three estimates, some 20 ms. None if this model lacks the recipe's targets."""

    def total(of: Recipe) -> int:
        return estimate(of, architecture, device=device).step_bytes

    try:
        plain, dora = (total(replace_setting(recipe, "lora.use_dora", on)) for on in (False, True))
        as_preset = total(structs.replace(recipe, lora=base.lora))
        return MemoryDeltas(dora - plain, (dora if recipe.lora.use_dora else plain) - as_preset)
    except UserError:
        return None


def format_delta(bytes_: int) -> str:
    """``+1.2 GiB``."""
    return f"{'-' if bytes_ < 0 else '+'}{format_bytes(abs(bytes_))}"


def trained_parameters(recipe: Recipe, architecture: Architecture) -> int:
    """Trained parameters of the adapter. Raises UserError for targets that the model does not have."""
    chosen = match_modules(recipe.lora.target_modules, architecture.targets)
    return adapter_parameters(chosen, recipe.lora) + sum(
        map(prod, vocabulary_shapes(recipe.lora, architecture))
    )


def saved_bytes(recipe: Recipe, architecture: Architecture) -> int:
    """Size of the saved adapter. peft saves a trained embedding that is tied to the head under both names."""
    twice = recipe.lora.train_embeddings and architecture.head.tied
    saved = trained_parameters(recipe, architecture) + (architecture.head.weight_params if twice else 0)
    return saved * SAVED_BYTES


def totals_text(recipe: Recipe, architecture: Architecture, estimate: Estimate) -> Content:
    """``40M of 7.62B parameters (0.53 %) · 154 MiB on disk · 464 MiB in memory with gradients…``.

    In memory is what the Memory screen lists under Adapter: its share of the peak.
    """
    trained = trained_parameters(recipe, architecture)
    share = trained / architecture.total_params
    return Content.assemble(
        (f"{format_count(trained)}", "bold"),
        f" of {format_count(architecture.total_params)} parameters ({_percent(share)}) · ",
        (format_bytes(saved_bytes(recipe, architecture)), "bold"),
        " on disk · ",
        (format_bytes(estimate.adapter_bytes), "bold"),
        " in memory with gradients and optimizer",
    )


def adapter_text(
    workbench: Workbench, budget: MemoryBudget, known: MemoryDeltas | None, width: int
) -> Content:
    """Totals of the adapter, if its model is known, over the differences from the preset."""
    differs = difference_text(workbench, known, width)
    compared, architecture = workbench.comparison(budget.device), workbench.architecture()
    if isinstance(compared, UserError) or isinstance(architecture, UserError):
        return differs
    recipe = workbench.recipe
    return Content("\n").join([totals_text(recipe, architecture, compared[precision_of(recipe)]), differs])


def difference_text(workbench: Workbench, known: MemoryDeltas | None, width: int) -> Content:
    """The LoRA settings that differ from the preset, and the memory they add; as many as fit."""
    changes = [
        c for c in diff_recipes(workbench.preset_recipe, workbench.recipe) if c.path.startswith("lora.")
    ]
    if not changes:
        return Content.styled(f"LoRA settings as in preset {workbench.preset}", "$text-muted")
    words = [
        str(change).removeprefix("lora.").removeprefix("use_").replace("_modules", "s") for change in changes
    ]
    memory_cost = f"{format_delta(known.preset_bytes)} · " if known and known.preset_bytes else ""
    for shown in range(len(words), -1, -1):
        rest = [f"{len(words) - shown} more"] if shown < len(words) else []
        named = " · ".join([*words[:shown], *rest])
        text = Content.assemble((f"vs {workbench.preset}: ", "$text-muted"), (memory_cost, "bold"), named)
        if len(text.wrap(width)) <= _MAX_LINES:
            break
    return text


def cursor_text(modules: Sequence[LinearModule], lora: Lora, *, in_block: bool) -> Content:
    """Describe the modules that the key for toggling would change."""
    if not modules:
        return Content.styled("No module here.", "$text-muted")
    trained = f"{format_count(adapter_parameters(modules, lora))} trainable{_own(modules, lora)}"
    if len(modules) == 1:
        only = modules[0]
        shape = f"{only.in_features:,} → {only.out_features:,}"
        return Content.styled(f"{only.name}  {shape}  {trained}", "$text-muted")
    block = "Block: " if in_block else ""
    end = f" · {key_name('lora.block')} toggle · Esc cancel" if in_block else ""
    weights = format_count(sum(module.weight_params for module in modules))
    return Content.styled(f"{block}{len(modules)} modules, {weights} weights, {trained}{end}", "$text-muted")


def _own(modules: Sequence[LinearModule], lora: Lora) -> str:
    """``, rank 32, alpha 16 to 64`` if a pattern sets any of them."""
    words = ""
    for name, number_of, own in (
        ("rank", rank_of, lora.rank_pattern),
        ("alpha", alpha_of, lora.alpha_pattern),
    ):
        numbers = sorted({number_of(lora, module) for module in modules})
        if own and numbers:
            words += (
                f", {name} {' to '.join(format_value(n) for n in dict.fromkeys((numbers[0], numbers[-1])))}"
            )
    return words


def _percent(share: float) -> str:
    return f"{share * 100:.2g} %"
