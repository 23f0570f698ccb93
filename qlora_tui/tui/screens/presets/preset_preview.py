"""What opening a preset would change: its note, the settings that differ, and the memory they come to."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_gib, pluralize
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Verdict
from qlora_tui.memory.solver import what_if
from qlora_tui.recipe.diff import DESCRIPTIVE, diff_recipes
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.presets import Preset
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import VERDICT_SIGN, VERDICT_STYLE

_NEED_WIDTH = 30
"""Cells of the list from which it has the memory."""
_LABEL_WIDTH = 80
"""Cells of the preview from which settings have their labels beside their names."""
_MIN_BAR, _MAX_BAR = 6, 24


def preset_line(preset: Preset, current: str, verdict: Verdict | None, width: int) -> Content:
    """Its name, and the memory with it; ● marks the one the recipe started as, ✗ one that cannot be read."""
    mark, style = ("● ", "$accent") if preset.name == current else ("  ", "")
    if preset.problem:
        mark, style = "✗ ", "$error"
    line = Content.assemble((mark, style), preset.name, ("" if preset.shipped else "  yours", "$text-muted"))
    if verdict is None or width < _NEED_WIDTH:
        return line
    word = verdict.word
    needed = f"{format_bytes(verdict.needed_bytes)} "
    figures = Content.assemble(needed, (VERDICT_SIGN[word], VERDICT_STYLE[word]))
    space = max(1, width - line.cell_length - figures.cell_length)
    return Content.assemble(line, " " * space, figures)


def preview(
    preset: Preset,
    recipe: Recipe,
    architecture: Architecture | UserError,
    budget: MemoryBudget,
    width: int,
) -> Content:
    """The note, the settings that would change, and the memory."""
    if preset.problem:
        return _refused(preset.problem)
    opened = preset.recipe(recipe)
    changes = [change for change in diff_recipes(recipe, opened) if change.path not in DESCRIPTIVE]
    lines = [Content.styled(preset.note or "No note.", "bold")]
    lines += _memory(recipe, opened if changes else None, architecture, budget, width)
    lines.append(Content(""))
    if not changes:
        return Content("\n").join([*lines, Content("The recipe already matches this preset.")])
    number = pluralize(len(changes), "setting")
    lines.append(Content.styled(f"Opening it changes {number}; model and data stay.", "$text-muted"))
    names = {change.path: fields()[change.path].label for change in changes}
    labels, paths = max(map(len, names.values())), max(map(len, names))
    for change in changes:
        head = f"{names[change.path]:<{labels}}  " if width >= _LABEL_WIDTH else ""
        path = f"{change.path:<{paths}}  "
        values = Content.assemble((f"{change.before} → ", "$text-muted"), (change.after, "bold"))
        indent = len(head) + len(path)
        first, *others = values.wrap(max(10, width - indent))
        lines.append(Content.assemble(head, (path, "$text-muted" if head else ""), first))
        lines += [Content(" " * indent) + other for other in others]
    return Content("\n").join(lines)


def _memory(
    recipe: Recipe,
    opened: Recipe | None,
    architecture: Architecture | UserError,
    budget: MemoryBudget,
    width: int,
) -> list[Content]:
    """The memory now and with the preset, against the limit."""
    if isinstance(architecture, UserError):
        return []
    lines = []
    variants = {"now": recipe} if opened is None else {"now": recipe, "then": opened}
    verdicts = what_if(variants.items(), architecture, budget)
    for label in variants:
        verdict = verdicts.get(label)
        if verdict is None:
            lines.append(Content.styled("This model does not have the targets of the recipe.", "$text-muted"))
            continue
        word = verdict.word
        figures = f"{format_gib(verdict.needed_bytes)} of {format_gib(budget.bytes)} GiB"
        cells = min(_MAX_BAR, width - 16 - len(figures) - len(word))
        drawn = bar(verdict.needed_bytes / budget.bytes, cells) + " " if cells >= _MIN_BAR else ""
        head = (f"{f'memory {label}':<12} ", "$text-muted")
        lines.append(
            Content.assemble(head, (drawn, "$secondary"), figures, "  ", (word, VERDICT_STYLE[word]))
        )
    return lines


def _refused(problem: UserError) -> Content:
    lines = [Content.styled(f"✗ {problem.title}", "$error"), Content(problem.what)]
    if problem.why:
        lines.append(Content(problem.why))
    if problem.fix:
        lines.append(Content.styled(f"▸ {problem.fix}", "$accent"))
    return Content("\n").join(lines)
