"""Details of one model: architecture, memory, license, download."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    abbreviate_home,
    format_bytes,
    format_count,
    format_duration,
    format_gib,
    format_path,
)
from qlora_tui.memory import check_fit, compare
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Precision
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.recipe_line import PRECISION_NAMES, VERDICT_STYLE

_LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)
_PLACES = {
    "hub cache": "Hugging Face cache",
    "folder": "folder",
    "gguf": "GGUF file",
    "converted": "app's cache",
}
_README_BYTES = 4096
SHOWN: tuple[Precision, ...] = ("nf4", "fp16")


@dataclass(frozen=True)
class HubFacts:
    """Details of one model from the Hub."""

    architecture: Architecture | None
    total_bytes: int
    done_bytes: int
    """Bytes that are already downloaded."""
    problem: UserError | None = None


def local_facts(model: LocalModel, recipe: Recipe, budget: MemoryBudget) -> Content:
    """Details of a model on this machine."""
    lines = [Content.styled(model.name, "bold")]
    if model.refusal:
        lines += _refused(model.refusal)
        if model.architecture:
            lines.append(Content.assemble(("Enter", "$accent bold"), " selects it for estimates only"))
    else:
        lines.append(Content.assemble(("Enter", "$accent bold"), " selects this model"))
    if model.architecture:
        lines += [
            *_costs(model.architecture, recipe, budget),
            Content(""),
            *_architecture_lines(model.architecture),
        ]
    license_id = read_license(model.path)
    location = f"{format_bytes(model.size_bytes)} in the {_PLACES[model.source]}"
    lines.append(Content(f"license {license_id} · {location}" if license_id else location))
    lines.append(Content.styled(format_path(model.path), "$text-muted"))
    return Content("\n").join(lines)


def hub_facts(
    model: HubModel, known: HubFacts | None, recipe: Recipe, budget: MemoryBudget, speed: float | None
) -> Content:
    """Details of a model on the Hub; ``known`` is what was loaded with Enter."""
    lines = [Content.styled(model.id, "bold")]
    refusal = model.refusal or (known.problem if known else None)
    if refusal:
        lines += [*_refused(refusal), Content("")]
    elif known is None:
        lines.append(Content.assemble(("Enter", "$accent bold"), " loads its details from the Hub"))
    else:
        lines.append(_to_fetch(known, speed))
        lines.append(Content.assemble(("Enter", "$accent bold"), " selects it for estimates, not downloaded"))
    if known and known.architecture:
        lines += [
            *_costs(known.architecture, recipe, budget),
            Content(""),
            *_architecture_lines(known.architecture),
        ]
    else:
        lines.append(
            Content(f"{model.model_type or 'family NA'} · {format_count(model.parameters)} parameters")
        )
    access = "gated: accept its license and log in" if model.gated else "no token needed"
    lines.append(Content(f"license {model.license or 'NA'} · {access}"))
    lines.append(Content(f"{model.downloads:,} downloads last month · changed {model.modified or 'NA'}"))
    return Content("\n").join(lines)


def read_license(path: Path) -> str:
    """The license from the front matter of the model's README; empty if there is none."""
    folder = path if path.is_dir() else path.parent
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as readme:
            match = _LICENSE.search(readme.read(_README_BYTES))
    except OSError:
        return ""
    return match[1] if match else ""


def _architecture_lines(model: Architecture) -> list[Content]:
    tied = "tied" if model.tied_head else "separate"
    context = "NA" if model.max_positions is None else f"{model.max_positions:,}"
    lines = [
        f"{model.model_type} · {format_count(model.total_params)} parameters",
        f"{model.layers} layers · hidden {model.hidden_size:,} · vocabulary {model.vocab_size:,}",
        f"context {context} · {model.heads} heads ({model.kv_heads} KV) · {tied} head",
    ]
    if model.experts:
        lines.append(f"{model.experts.count} experts, {model.experts.per_token} per token")
    return [Content(line) for line in lines]


def _costs(model: Architecture, recipe: Recipe, budget: MemoryBudget) -> list[Content]:
    note = ""
    try:
        compared = compare(recipe, model, device=budget.device)
    except UserError:
        # The recipe's targets are another model's.
        compared = compare(
            replace_setting(recipe, "lora.target_modules", (ALL_LINEAR,)), model, device=budget.device
        )
        note = "with all-linear: it does not have the recipe's targets"
    lines = [Content.styled(f"With this recipe, of {format_gib(budget.bytes)} GiB", "bold")]
    for precision in SHOWN:
        estimate = compared[precision]
        word = check_fit(estimate, budget.bytes).word
        figures = f"{PRECISION_NAMES[precision]:<5}{format_gib(estimate.total_bytes):>6} GiB  "
        lines.append(Content.assemble(figures, (word, VERDICT_STYLE[word])))
    return [*lines, Content.styled(note, "$text-muted")] if note else lines


def _to_fetch(known: HubFacts, speed: float | None) -> Content:
    missing = known.total_bytes - known.done_bytes
    if not missing:
        return Content("Already on this machine.")
    took = f", {format_duration(missing / speed)} at the last speed" if speed else ""
    part = f"; {format_bytes(known.done_bytes)} already here" if known.done_bytes else ""
    return Content.assemble(
        (key_name("models.download"), "$accent bold"), f" downloads {format_bytes(missing)}{took}{part}"
    )


def _refused(problem: UserError) -> list[Content]:
    lines = [Content.styled(f"✗ {problem.title}", "$error"), Content(abbreviate_home(problem.what))]
    if problem.why:
        lines.append(Content.styled(abbreviate_home(problem.why), "$text-muted"))
    if problem.fix:
        lines.append(Content.styled(f"▸ {abbreviate_home(problem.fix)}", "$accent"))
    return lines
