"""The settings beside the module grid, each with a line of advice from the papers.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 7.2. QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 4.
rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from textual.content import Content

from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.fields import fields, get_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Lora, Recipe
from qlora_tui.tui.key_names import bare_key

_MIN_ADVICE = 50
"""Cells from which advice stands beside its setting."""


@dataclass(frozen=True)
class LoraControl:
    """One setting on the LoRA screen."""

    path: str
    commands: tuple[str, ...]
    """Ids of the commands that change it."""


LORA_CONTROLS: tuple[LoraControl, ...] = (
    LoraControl("lora.rank", ("lora.rank_up", "lora.rank_down")),
    LoraControl("lora.alpha", ("lora.alpha_up", "lora.alpha_down")),
    LoraControl("lora.dropout", ("lora.dropout_up", "lora.dropout_down")),
    LoraControl("lora.use_rslora", ("lora.rslora",)),
    LoraControl("lora.use_dora", ("lora.dora",)),
    LoraControl("lora.train_embeddings", ("lora.embeddings",)),
)


def setting_lines(recipe: Recipe, base: Recipe, dora_cost: str, width: int) -> list[tuple[str, Content]]:
    """(path, line) of each setting, with the first words of its advice where there is room."""
    lines = []
    for control in LORA_CONTROLS:
        head = control_line(control, recipe, base)
        room = width - head.cell_length - 1
        words = setting_advice(control.path, recipe, base, dora_cost) if room >= _MIN_ADVICE else ""
        lines.append(
            (
                control.path,
                Content.assemble(head, (f" {words}", "$text-muted")).truncate(width, ellipsis=True),
            )
        )
    return lines


def setting_advice(path: str, recipe: Recipe, base: Recipe, dora_cost: str) -> str:
    """Advice on a setting of this recipe; ``dora_cost`` is the memory of DoRA, where it is known."""
    words = advice(path, recipe.lora)
    if path == "lora.alpha" and (changed := changed_scale(recipe.lora, base.lora)):
        words = changed
    if path == "lora.use_dora" and dora_cost:
        words = f"{dora_cost}. {words}"
    return words


def term_of(path: str) -> str:
    """The setting's word in the glossary."""
    return _NAMES.get(path, fields()[path].key)


def control_line(control: LoraControl, recipe: Recipe, base: Recipe) -> Content:
    """``r R rank        16*``: keys, name, value, and a star where it is not the preset's."""
    name = term_of(control.path)
    value = get_setting(recipe, control.path)
    star = "*" if value != get_setting(base, control.path) else " "
    keys = " ".join(map(bare_key, control.commands))
    return Content.assemble(
        (f"{keys:<4}", "$accent bold"), f"{name:<8}", (f"{format_value(value):>6}{star}", "bold")
    )


def scale_of(lora: Lora) -> float:
    """The factor of the update B·A: alpha/rank, or alpha/√rank with rsLoRA."""
    return lora.alpha / (sqrt(lora.rank) if lora.use_rslora else lora.rank)


def changed_scale(lora: Lora, base: Lora) -> str:
    """What became of the scale where the rank changed and alpha did not follow; empty otherwise."""
    if lora.rank == base.rank or lora.alpha != base.alpha or scale_of(lora) == scale_of(base):
        return ""
    return f"Scales the update by {scale_of(lora):.3g} instead of {scale_of(base):.3g}: alpha is unchanged."


def advice(path: str, lora: Lora) -> str:
    """One line of advice on a setting of this recipe."""
    return _ADVICE[path](lora)


def _rank(lora: Lora) -> str:
    if lora.target_modules == (ALL_LINEAR,):
        return "The QLoRA paper saw no effect of rank with all-linear."
    return "On q and v, ranks 1 to 8 did as well as 64 (LoRA paper)."


def _alpha(lora: Lora) -> str:
    return f"Scales the update by {scale_of(lora):.3g}, much like the learning rate."


def _dropout(lora: Lora) -> str:
    return "QLoRA paper: 0.1 to 13B, 0.05 above. 0 saves memory."


def _rslora(lora: Lora) -> str:
    if lora.use_rslora:
        return "Scales by alpha/√rank, so that high ranks keep learning."
    return f"Scales the update {sqrt(lora.rank):.3g} times as much, for high ranks."


def _dora(lora: Lora) -> str:
    return "Better at low ranks, slower at every rank (DoRA paper)."


def _embeddings(lora: Lora) -> str:
    if lora.train_embeddings:
        return "They learn at a tenth of the rate, as in Unsloth's example, unless another is set."
    return "Unsloth trains them for continued pretraining."


_NAMES = {
    "lora.use_rslora": "rsLoRA",
    "lora.use_dora": "DoRA",
    "lora.train_embeddings": "embed",
}
_ADVICE = {
    "lora.rank": _rank,
    "lora.alpha": _alpha,
    "lora.dropout": _dropout,
    "lora.use_rslora": _rslora,
    "lora.use_dora": _dora,
    "lora.train_embeddings": _embeddings,
}


def targets_advice(lora: Lora) -> str:
    """One line on the choice of modules."""
    if lora.target_modules == (ALL_LINEAR,):
        return "The QLoRA paper needed all layers to match full fine-tuning."
    return "In the QLoRA paper, fewer layers fell short of full fine-tuning."
