"""What a model would need at several sequence lengths, in the recipe's precision and another."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.memory import Device, Estimate, check_fit, estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Precision, precision_of, why_int8_is_larger, with_precision
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import PRECISION_NAMES, VERDICT_SIGN, verdict_words

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_LENGTH_CELLS, _FIGURE_CELLS = 9, 12
_MIN_BAR = 6


@dataclass(frozen=True)
class LengthFit:
    """The memory at one sequence length: bytes and verdict in each precision."""

    length: int
    is_current: bool
    """Whether it is the recipe's."""
    needs: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class ModelFit:
    """Memory of one model with a recipe."""

    precisions: tuple[Precision, ...]
    rows: tuple[LengthFit, ...]
    budget: MemoryBudget
    notes: tuple[str, ...] = ()
    """What explains the figures, in sentences."""


def model_fit(model: Architecture, recipe: Recipe, budget: MemoryBudget) -> ModelFit:
    """Estimate each length up to the model's context; takes some milliseconds for each."""
    usable = _with_targets(model, recipe, budget.device)
    note = "" if usable is recipe else "with all-linear: it does not have the recipe's targets"
    precision = precision_of(recipe)
    precisions: tuple[Precision, ...] = (precision, "nf4" if precision == "fp16" else "fp16")
    own = recipe.data.max_length
    lengths = sorted({own, *(length for length in _LENGTHS if length <= (model.max_positions or length))})
    rows, reason = [], ""
    for length in lengths:
        changed = replace_setting(usable, "data.max_length", length)
        estimates = [_estimate(model, changed, precision, budget.device) for precision in precisions]
        needs = tuple((each.total_bytes, check_fit(each, budget.bytes).word) for each in estimates)
        rows.append(LengthFit(length, length == own, needs))
        if precision == "int8":
            reason = reason or why_int8_is_larger(*estimates)
    return ModelFit(precisions, tuple(rows), budget, tuple(filter(None, (note, reason))))


def need(model: Architecture, recipe: Recipe, budget: MemoryBudget) -> tuple[int, str]:
    """Bytes and verdict of a model with the recipe as it is."""
    estimated = estimate(_with_targets(model, recipe, budget.device), model, device=budget.device)
    return estimated.total_bytes, check_fit(estimated, budget.bytes).word


def _with_targets(model: Architecture, recipe: Recipe, device: Device) -> Recipe:
    """The recipe, or one with all linear modules where its targets are another model's."""
    try:
        estimate(recipe, model, device=device)
    except UserError:
        return replace_setting(recipe, "lora.target_modules", (ALL_LINEAR,))
    return recipe


def _estimate(model: Architecture, recipe: Recipe, precision: Precision, device: Device) -> Estimate:
    return estimate(with_precision(recipe, precision), model, device=device)


def fit_lines(fit: ModelFit, width: int, *, can_train: bool = True) -> list[Content]:
    """A line a length, with a bar of the first precision where there is room; signs are explained below.

    ``can_train``: whether the model can be trained; otherwise it *would* fit.
    """
    columns = _LENGTH_CELLS + len(fit.precisions) * (_FIGURE_CELLS + 1)
    cells = width - columns - 1
    names = "".join(f"{PRECISION_NAMES[each]:>{_FIGURE_CELLS - 2}}   " for each in fit.precisions)
    space = " " * (cells + 1) if cells >= _MIN_BAR else ""
    lines = [Content.styled(f"{'length':>{_LENGTH_CELLS}}{space}{names}".rstrip(), "dim")]
    for row in fit.rows:
        weight = "bold" if row.is_current else ""
        parts: list[tuple[str, str]] = [
            ("▸" if row.is_current else " ", "bold $accent"),
            (f"{row.length:>{_LENGTH_CELLS - 1},}", weight),
        ]
        if space:
            parts.append((f" {bar(row.needs[0][0] / fit.budget.bytes, cells)}", "$secondary"))
        for bytes_, word in row.needs:
            parts.append((f"{format_bytes(bytes_):>{_FIGURE_CELLS - 2}} ", weight))
            parts.append((f"{VERDICT_SIGN[word]} ", verdict_words(word, can_train=can_train)[1]))
        lines.append(Content.assemble(*parts).rstrip())
    words = dict.fromkeys(word for row in fit.rows for _, word in row.needs)
    legend = Content("")
    for word in words:
        said, style = verdict_words(word, can_train=can_train)
        legend += Content.assemble((VERDICT_SIGN[word], style), f" {said}   ")
    lines.append(legend.rstrip())
    return [*lines, *(Content.styled(note, "dim") for note in fit.notes)]
