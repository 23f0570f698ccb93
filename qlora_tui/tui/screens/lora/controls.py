"""What the papers say of each LoRA setting, in a line, with the source; and what this recipe makes of it.

LoRA: Hu et al. 2021, arXiv 2106.09685. QLoRA: Dettmers et al. 2023, arXiv 2305.14314. rsLoRA: Kalajdzievski
2023, arXiv 2312.03732. DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from textual.content import Content

from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.fields import fields, get_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Lora, Recipe


@dataclass(frozen=True)
class LoraControl:
    """One setting on the LoRA screen."""

    path: str
    keys: str
    """As the line shows them."""
    steps: tuple[float, ...] = ()
    """What a key goes through; empty doubles and halves, or flips what is on or off."""


LEAST_HALVED = 1
"""Where halving ends; smaller values of alpha are for the form on the Train screen."""
DROPOUTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
LORA_CONTROLS: tuple[LoraControl, ...] = (
    LoraControl("lora.rank", "r R"),
    LoraControl("lora.alpha", "a A"),
    LoraControl("lora.dropout", "d D", DROPOUTS),
    LoraControl("lora.use_rslora", "s"),
    LoraControl("lora.use_dora", "w"),
)


def next_value(knob: LoraControl, value: float, up: bool) -> float | bool:
    """The value after one press of its key, within the setting's bounds."""
    field = fields()[knob.path]
    if field.kind == "bool":
        return not value
    if knob.steps:
        beyond = [step for step in knob.steps if (step > value if up else step < value)]
        return (beyond[0] if up else beyond[-1]) if beyond else value
    changed = value * 2 if up else max(value / 2, min(value, LEAST_HALVED))
    if field.kind == "int":
        changed = int(changed)
    return changed if field.maximum is None else min(changed, field.maximum)


def control_line(knob: LoraControl, recipe: Recipe, base: Recipe) -> Content:
    """``r R rank        16*``: keys, name, value, and a star where it is not the preset's."""
    name = _NAMES.get(knob.path, fields()[knob.path].key)
    value = get_setting(recipe, knob.path)
    star = "*" if value != get_setting(base, knob.path) else " "
    return Content.assemble(
        (f"{knob.keys:<4}", "$accent bold"), f"{name:<8}", (f"{format_value(value):>6}{star}", "bold")
    )


def scale_of(lora: Lora) -> float:
    """What the update B·A is multiplied by."""
    return lora.alpha / (sqrt(lora.rank) if lora.use_rslora else lora.rank)


def advice(path: str, lora: Lora) -> str:
    """One line on a setting, as it stands in this recipe."""
    return _ADVICE[path](lora)


def _rank(lora: Lora) -> str:
    if lora.target_modules == (ALL_LINEAR,):
        return "QLoRA §4: with every layer adapted, rank hardly matters"
    return "LoRA §7.2: on q and v, ranks from 1 to 8 did as well as 64"


def _alpha(lora: Lora) -> str:
    return f"Update × {scale_of(lora):.3g}. LoRA §4.1: like tuning the learning rate"


def _dropout(lora: Lora) -> str:
    return "QLoRA: 0.1 up to 13B, 0.05 above. At 0 no copies are kept"


def _rslora(lora: Lora) -> str:
    if lora.use_rslora:
        return "alpha/√rank: high ranks go on learning (rsLoRA paper)"
    return f"alpha/√rank is ×{sqrt(lora.rank):.3g} here; for high ranks (rsLoRA paper)"


def _dora(lora: Lora) -> str:
    return "Ahead at low rank (DoRA paper), slower at any"


_NAMES = {"lora.use_rslora": "rsLoRA", "lora.use_dora": "DoRA"}
_ADVICE = {
    "lora.rank": _rank,
    "lora.alpha": _alpha,
    "lora.dropout": _dropout,
    "lora.use_rslora": _rslora,
    "lora.use_dora": _dora,
}


def targets_advice(lora: Lora) -> str:
    """One line on the choice of modules."""
    if lora.target_modules == (ALL_LINEAR,):
        return "QLoRA §4: what it took to match full fine-tuning"
    return "QLoRA §4: less than all-linear fell short of full fine-tuning"
