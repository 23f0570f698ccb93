"""A recipe in one line, and how precisions and verdicts are shown on every screen."""

from __future__ import annotations

from pathlib import Path

from rich.cells import cell_len, set_cell_size

from qlora_tui.errors import UserError
from qlora_tui.formatting import short_model_name, uncapitalize
from qlora_tui.memory.estimate import Precision
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.tui.workbench import Workbench

VERDICT_STYLE = {
    "fits": "$success",
    "tight": "$warning",
    "uncertain": "$warning",
    "does not fit": "$error",
}
"""Color of each verdict; the word or the sign is always shown too."""
VERDICT_SIGN = {"fits": "✓", "tight": "!", "uncertain": "?", "does not fit": "✗"}
"""Where there is no room for the word."""
CANNOT_TRAIN = "✗ cannot train"
"""Beside an estimate of a model that has no weights here, or that cannot be trained for another reason."""
_SEPARATOR = " · "
_MIN_NAME = 9
"""Cells that a name is not shortened below."""
PRECISION_NAMES: dict[Precision, str] = {"nf4": "NF4", "int8": "int8", "fp16": "fp16"}


def recipe_line(workbench: Workbench, width: int | None = None) -> str:
    """``balanced* · Qwen2.5-7B · tickets.jsonl · r16 all-linear · 2,048 tok · batch 2 × 8``.

    To fit a ``width`` the batch becomes ``× 2 × 8``, then names are shortened, that of the data first; the
    numbers stay.
    """
    recipe = workbench.recipe
    star = "*" if workbench.modified else ""
    parts = [
        f"{workbench.preset or 'defaults'}{star}",
        short_model_name(recipe.model.id) or "no model",
        data_words(recipe),
        f"{format_rank(recipe.lora)} {targets_words(recipe, 16)}",
        batch_words(recipe),
    ]
    if width is not None and cell_len(_SEPARATOR.join(parts)) > width:
        parts[-1] = batch_words(recipe, short=True)
    for place in (2, 1, 0):
        over = 0 if width is None else cell_len(_SEPARATOR.join(parts)) - width
        name = parts[place]
        cells = cell_len(name)
        if over > 0 and cells > _MIN_NAME + 1:
            parts[place] = cut_cells(name, max(_MIN_NAME, cells - over - 1)).rstrip(".-_ ") + "…"
    line = _SEPARATOR.join(parts)
    return line if width is None else cut_cells(line, width)


def verdict_words(word: str, *, can_train: bool) -> tuple[str, str]:
    """The verdict with its color: a model that cannot be trained *would* fit."""
    return ("would fit", "$text-muted") if word == "fits" and not can_train else (word, VERDICT_STYLE[word])


def refusal_words(refusal: UserError) -> str:
    """``✗ cannot train: this model has no weights``."""
    return f"{CANNOT_TRAIN}: {uncapitalize(refusal.title)}"


def cut_cells(text: str, width: int) -> str:
    """The beginning of ``text`` that fits ``width`` cells: Chinese characters, for example, take two."""
    return text if cell_len(text) <= width else set_cell_size(text, width).rstrip()


def batch_words(recipe: Recipe, *, short: bool = False) -> str:
    """``1,024 tok · batch 1 × 8``: sequence length, micro-batch size, gradient accumulation.

    ``short``: ``1,024 tok × 1 × 8``, for 80 columns.
    """
    batch = f"{recipe.training.micro_batch_size} × {recipe.training.gradient_accumulation}"
    return f"{recipe.data.max_length:,} tok {'×' if short else '· batch'} {batch}"


def targets_words(recipe: Recipe, width: int) -> str:
    """The target modules, or their number where the names are longer than ``width``."""
    patterns = recipe.lora.target_modules
    names = ",".join(patterns)
    return names if len(names) <= width else f"{len(patterns)} targets"


def preference_words(recipe: Recipe) -> str:
    """``DPO β 0.1``: how preferences are trained on; empty where answers alone are."""
    method, training = recipe.preference_method, recipe.training
    if method is None:
        return ""
    beta = f" β {training.preference_beta:g}" if training.preference_beta else ""
    gamma = f" γ {training.simpo_gamma:g}" if method == "simpo" else ""
    return f"{'SimPO' if method == 'simpo' else method.upper()}{beta}{gamma}"


def data_words(recipe: Recipe) -> str:
    """Name of the first data file, and how many more there are."""
    sources = recipe.data.sources
    if not sources:
        return "no data"
    more = f" +{len(sources) - 1}" if len(sources) > 1 else ""
    return Path(sources[0].path).name + more
