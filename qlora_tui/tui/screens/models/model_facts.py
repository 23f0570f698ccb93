"""Details of one model: architecture, license, files, download."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel, hub_cache_dir
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    abbreviate_home,
    format_bytes,
    format_count,
    format_duration,
    format_path,
)
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.charts import labeled
from qlora_tui.tui.screens.models.starter_choice import Starter

_LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)
_PLACES = {
    "hub cache": "Hugging Face cache",
    "folder": "folder",
    "gguf": "GGUF file",
    "converted": "app's cache",
}
_README_BYTES = 4096
_LABEL = 11
"""Cells of the column of labels."""
_fact = partial(labeled, cells=_LABEL)


@dataclass(frozen=True)
class HubFacts:
    """Details of one model from the Hub."""

    architecture: Architecture | None
    total_bytes: int
    done_bytes: int
    """Bytes that are already downloaded."""
    problem: UserError | None = None


def local_facts(model: LocalModel, *, is_current: bool) -> list[Content]:
    """Details of a model on this machine. ``is_current``: whether it is the recipe's."""
    lines = []
    if is_current:
        lines.append(Content.assemble(("● ", "$accent bold"), ("The recipe's model", "bold")))
    if model.refusal:
        lines += _refused(model.refusal, _download_step(model))
        if model.architecture and not is_current:
            lines.append(_step("Enter", "Select it for estimates only", mark=" "))
    elif not is_current:
        lines.append(_step("Enter", "Select this model"))
    lines.append(_fact("license", read_license(model.path) or _no_license(model)))
    if model.architecture:
        lines += _architecture_lines(model.architecture)
    return [
        *lines,
        _fact("on disk", f"{format_bytes(model.size_bytes)} in the {_PLACES[model.source]}"),
        Content.styled(format_path(model.path), "dim"),
    ]


def hub_facts(model: HubModel, known: HubFacts | None, speed: float | None) -> list[Content]:
    """Details of a model on the Hub; ``known`` is what was loaded with Enter."""
    refusal = model.refusal or (known.problem if known else None)
    if refusal:
        lines = _refused(refusal)
    elif known is None:
        lines = [_step("Enter", "Load its details from the Hub")]
    else:
        lines = [_to_fetch(known, speed), _step("Enter", "Select it for estimates, not downloaded", mark=" ")]
    lines.append(_fact("license", model.license or "NA"))
    if known and known.architecture:
        lines += _architecture_lines(known.architecture)
    else:
        lines += [
            _fact("size", f"{format_count(model.parameters)} parameters"),
            _fact("family", model.model_type or "NA"),
        ]
    return [
        *lines,
        _fact("access", "gated: accept its license and log in" if model.gated else "no token needed"),
        _fact("downloads", f"{model.downloads:,} last month"),
        _fact("changed", model.modified or "NA"),
    ]


def starter_facts(model: Starter) -> list[Content]:
    """Details of a model to start with, before the Hub was asked."""
    return [
        _step(key_name("models.download"), f"Download about {format_bytes(model.download_bytes)}"),
        _step("Enter", "Find it on the Hub", mark=" "),
        _fact("license", model.license),
        *_architecture_lines(model.architecture),
        _fact("access", "no token needed"),
    ]


def storage_lines(models: Sequence[LocalModel]) -> list[Content]:
    """What the models on this machine take, and how much room there is for more."""
    cache = hub_cache_dir()
    free = disk_free_bytes(cache)
    used = sum(model.size_bytes for model in models)
    return [
        _fact("models", f"{len(models)}, {format_bytes(used)} in all"),
        _fact("disk", f"{format_bytes(free)} free" if free is not None else "NA"),
        Content.styled(format_path(cache), "dim"),
    ]


def disk_free_bytes(folder: Path) -> int | None:
    """Room on the disk where a folder is or will be; None if it cannot be asked."""
    existing = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def read_license(path: Path) -> str:
    """The license from the front matter of the model's README; empty if there is none."""
    folder = path if path.is_dir() else path.parent
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as readme:
            match = _LICENSE.search(readme.read(_README_BYTES))
    except OSError:
        return ""
    return match[1] if match else ""


def _no_license(model: LocalModel) -> str:
    """Where it may be read, if that is known."""
    page = f": huggingface.co/{model.id}" if model.source == "hub cache" else ""
    return f"not in its files{page}"


def _step(key: str, text: str, mark: str = "▸") -> Content:
    return Content.assemble((f"{mark} {key}  ", "$accent bold"), (text, "bold" if mark == "▸" else ""))


def _architecture_lines(model: Architecture) -> list[Content]:
    tied = "tied" if model.tied_head else "separate"
    context = "NA" if model.max_positions is None else f"{model.max_positions:,} tokens"
    lines = [
        _fact("size", f"{format_count(model.total_params)} parameters"),
        _fact("family", model.model_type),
        _fact("context", context),
        _fact("layers", f"{model.layers}, hidden size {model.hidden_size:,}"),
        _fact("heads", f"{model.heads} ({model.kv_heads} KV)"),
        _fact("vocabulary", f"{model.vocab_size:,}, {tied} head"),
    ]
    if model.experts:
        lines.append(_fact("experts", f"{model.experts.count}, {model.experts.per_token} per token"))
    return lines


def _to_fetch(known: HubFacts, speed: float | None) -> Content:
    missing = known.total_bytes - known.done_bytes
    if not missing:
        return Content("Already on this machine.")
    took = f", {format_duration(missing / speed)} at the last speed" if speed else ""
    part = f"; {format_bytes(known.done_bytes)} already here" if known.done_bytes else ""
    return _step(key_name("models.download"), f"Download {format_bytes(missing)}{took}{part}")


def can_be_completed(model: LocalModel) -> bool:
    """Whether a download brings what the model lacks: it is one of the Hub's."""
    return model.source == "hub cache" and isinstance(model.refusal, MissingFilesError)


def _download_step(model: LocalModel) -> Content | None:
    """The key that gets the files that a model lacks."""
    if can_be_completed(model):
        return _step(key_name("models.download"), "Download the missing files")
    if isinstance(model.refusal, MissingFilesError):
        return _step(key_name("models.filter"), "Find it on the Hub, to download it")
    return None


def _refused(problem: UserError, step: Content | None = None) -> list[Content]:
    """What is wrong with a model, and what to do: ``step``, or as the problem says."""
    lines = [Content.styled(f"✗ {problem.title}", "$error"), Content(abbreviate_home(problem.what))]
    if problem.why:
        lines.append(Content.styled(abbreviate_home(problem.why), "$text-muted"))
    if step is not None:
        lines.append(step)
    elif problem.fix:
        lines.append(Content.styled(f"▸ {abbreviate_home(problem.fix)}", "$accent"))
    return lines
