"""What opening a preset would change: its note, the settings that differ, and the memory they come to."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_gib
from qlora_tui.memory import Device, estimate
from qlora_tui.recipe.diff import DESCRIPTIVE, diff_recipes
from qlora_tui.recipe.presets import Preset
from qlora_tui.recipe.schema import Recipe


def preset_line(preset: Preset, current: str) -> Content:
    """Its name; ● marks the one the recipe started as, ✗ one that cannot be read."""
    mark, style = ("● ", "$accent") if preset.name == current else ("  ", "")
    if preset.problem:
        mark, style = "✗ ", "$error"
    return Content.assemble((mark, style), preset.name, ("" if preset.shipped else "  yours", "$text-muted"))


def preview(
    preset: Preset, recipe: Recipe, architecture: Architecture | UserError, device: Device
) -> Content:
    """The note, the settings that would change, and the memory."""
    if preset.problem:
        return _refused(preset.problem)
    opened = preset.recipe(recipe)
    changes = [change for change in diff_recipes(recipe, opened) if change.path not in DESCRIPTIVE]
    lines = [Content.styled(preset.note or "No note.", "bold"), Content("")]
    if not changes:
        return Content("\n").join([*lines, Content("The recipe already matches this preset.")])
    lines.append(Content.styled("Opening it changes:", "$text-muted"))
    width = max(len(change.path) for change in changes)
    lines += [
        Content.assemble(f"{change.path:<{width}}  ", (f"{change.before} → ", "$text-muted"), change.after)
        for change in changes
    ]
    return Content("\n").join([*lines, Content(""), _memory(recipe, opened, architecture, device)])


def _memory(
    recipe: Recipe, opened: Recipe, architecture: Architecture | UserError, device: Device
) -> Content:
    if isinstance(architecture, UserError):
        return Content("")
    try:
        before, after = (estimate(each, architecture, device=device).total_bytes for each in (recipe, opened))
    except UserError as problem:
        return Content.styled(problem.what, "$text-muted")
    return Content.assemble(("memory  ", "$text-muted"), f"{format_gib(before)} → {format_gib(after)} GiB")


def _refused(problem: UserError) -> Content:
    lines = [Content.styled(f"✗ {problem.title}", "$error"), Content(problem.what)]
    if problem.why:
        lines.append(Content(problem.why))
    if problem.fix:
        lines.append(Content.styled(f"▸ {problem.fix}", "$accent"))
    return Content("\n").join(lines)
