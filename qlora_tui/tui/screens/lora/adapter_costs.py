"""What the adapter costs, and what other ranks and targets would: parameters, size on disk, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from msgspec import structs
from textual.content import Content
from textual.widgets import Static

from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_count, format_gib
from qlora_tui.memory import Device, Estimate, estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Verdict, precision_of
from qlora_tui.memory.layout import vocabulary_shapes
from qlora_tui.memory.solver import what_if
from qlora_tui.recipe.fields import diff_recipes, format_value, replace_setting
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import alpha_of, match_modules, rank_of
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import verdict_words
from qlora_tui.tui.screens.lora.module_grid import adapter_parameters
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel
from qlora_tui.tui.workbench import Workbench

_RANKS = (4, 8, 16, 32, 64, 128, 256)
_TARGETS = {
    "all-linear": ("all-linear",),
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gate, up, down": ("gate_proj", "up_proj", "down_proj"),
    "q, v": ("q_proj", "v_proj"),
}
_NAME = 15
_WORDS = 62
"""Cells of a line without its bar."""
_MAX_BAR = 40
_MIN_BAR = 6
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


@dataclass(frozen=True)
class ChoiceCost:
    """The recipe with another rank, or with other targets."""

    name: str
    of: Literal["rank", "targets"]
    is_current: bool
    trained: int
    saved_bytes: int
    verdict: Verdict


class ChoicesPanel(Panel):
    """The table, with the keys for the rank."""

    def __init__(self) -> None:
        self._table = Static(id="choices")
        self._costs: tuple[ChoiceCost, ...] = ()
        self._can_train = True
        keys = (("lora.rank_up", "rank ×2"), ("lora.rank_down", "rank ÷2"))
        super().__init__("What other choices would cost", self._table, keys=keys, id="choices-panel")

    def show(self, costs: tuple[ChoiceCost, ...], *, can_train: bool) -> None:
        """Show these; nothing until they are known. ``can_train``: whether the model can be trained."""
        self._costs, self._can_train = costs, can_train
        self._redraw()

    def on_resize(self) -> None:
        # The table knows its new width only after the layout.
        self.call_after_refresh(self._redraw)

    def _redraw(self) -> None:
        lines = choice_lines(self._costs, self._table.content_size.width, can_train=self._can_train)
        update_if_changed(self._table, Content("\n").join(lines))


def choice_costs(recipe: Recipe, architecture: Architecture, budget: MemoryBudget) -> tuple[ChoiceCost, ...]:
    """Estimate each choice, some 10 ms each; without those that the model does not have."""
    choices: dict[tuple[Literal["rank", "targets"], str], Recipe] = {}
    for rank in sorted({*_RANKS, recipe.lora.rank}):
        choices["rank", f"rank {rank}"] = replace_setting(recipe, "lora.rank", rank)
    for name, targets in _TARGETS.items():
        if name == "all-linear" or set(targets) <= set(architecture.kinds()):
            choices["targets", name] = replace_setting(recipe, "lora.target_modules", targets)
    costs = []
    for (of, name), verdict in what_if(choices.items(), architecture, budget).items():
        changed = choices[of, name]
        trained, saved = trained_parameters(changed, architecture), saved_bytes(changed, architecture)
        costs.append(ChoiceCost(name, of, changed == recipe, trained, saved, verdict))
    return tuple(costs)


def choice_lines(costs: tuple[ChoiceCost, ...], width: int, *, can_train: bool = True) -> list[Content]:
    """``▸ rank 16   40M   154 MiB  ███░░░░  6.3 GiB fits``: a line for each, the recipe's own marked.

    Ranks stand under the head of the columns, targets under one that says they are for the recipe's rank.
    """
    if not costs:
        return []
    cells = min(_MAX_BAR, width - _WORDS)
    drawn = cells + 1 if cells >= _MIN_BAR else 0
    head = f"  {'':<{_NAME}} {'trainable':>9} {'on disk':>9}  {'':<{drawn}}{'memory':>9}"
    lines = [Content.styled(head, "dim")]
    for before, cost in zip((None, *costs), costs, strict=False):
        if before is not None and cost.of != before.of:
            lines += [Content(""), Content.styled("  targets, at the rank marked above", "dim")]
        mark, style = ("▸", "bold") if cost.is_current else (" ", "")
        disk = format_bytes(cost.saved_bytes)
        needed = cost.verdict.needed_bytes
        share = f"{bar(needed / cost.verdict.available_bytes, cells)} " if drawn else ""
        lines.append(
            Content.assemble(
                (mark, "bold $accent"),
                (f" {cost.name:<{_NAME}} {format_count(cost.trained):>9} {disk:>9}  ", style),
                (share, "$secondary"),
                (f"{format_gib(needed):>5} GiB ", style),
                verdict_words(cost.verdict.word, can_train=can_train),
            )
        )
    return lines
