"""What the export dialog offers: choices, the path it proposes, the request, and lines of earlier exports."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.gguf import (
    AUTO,
    K_QUANTS,
    bytes_to_run,
    estimated_bytes,
    rows_without_k_blocks,
)
from qlora_tui.export.llama_cpp.client import install_hint, is_installed
from qlora_tui.formatting import format_bytes, format_duration, truncate_middle
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.runs.exports import Export, ExportRequest, Form

_TYPES = ("Q8_0", "F16", AUTO, "Q4_K_M", "Q5_K_M", "Q6_K")
_NEED_LLAMA_CPP = (AUTO, "Q4_K_M", "Q5_K_M", "Q6_K")
_SIGNS = {"running": ("▸", "$primary"), "finished": ("✓", "$success"), "failed": ("✗", "$error")}
_AUTO = (
    " auto: the smallest type that still answers like your adapter: the first within a KL divergence of "
    "0.03, as llama.cpp computes it."
)
HUB_FORMS = ("adapter", "merged")
"""What is uploaded to the Hub, besides GGUF files."""
_LINE_WIDTH = 66
"""Cells of an export's line, so that it fits 80 columns."""


Target: TypeAlias = Literal["File", "Folder", "Name", "Repository"]


_NAMES: tuple[Target, ...] = ("Name", "Repository")


@dataclass(frozen=True)
class ExportChoice:
    """One form to export."""

    id: str
    label: str
    size: str
    note: str
    """What it is for, in a few words."""
    detail: str
    """What it is, in sentences."""
    form: Form
    file_type: str = ""
    suffix: str = ""
    """End of the proposed file name."""
    target: Target = "File"
    """What is asked for."""
    types: tuple[str, ...] = ()
    """What a key changes, in its order: the type of a GGUF file, or what is uploaded; empty for neither."""


def export_choices(
    architecture: Architecture | None,
    budget: MemoryBudget,
    adapter_bytes: int,
    file_type: str = _TYPES[0],
    hub_form: str = HUB_FORMS[0],
) -> list[ExportChoice]:
    """Return every choice, the most useful first; sizes need the model's architecture.

    ``file_type`` is that of GGUF files; ``hub_form`` is what is uploaded: one of :data:`HUB_FORMS`, or a
    type.
    """
    types = tuple(kind for kind in _TYPES if is_installed() or kind not in _NEED_LLAMA_CPP)
    adapter_size = format_bytes(adapter_bytes)
    merged = "" if architecture is None else format_bytes(architecture.total_params * 2)
    size, fit = _size_and_fit(file_type, architecture, budget)
    about_type = fit + _about_type(file_type, architecture)
    if is_installed():
        checked = "llama.cpp then compares the file with your adapter's answers."
    else:
        checked = f"Not checked, and smaller types need llama.cpp. {install_hint()}"
    form: Form
    match hub_form:
        case "adapter":
            form, uploaded, uploaded_size = "hub-adapter", "the adapter", adapter_size
        case "merged":
            form, uploaded, uploaded_size = "hub-merged", "the merged model", merged
        case _:
            form, uploaded = "hub-gguf", f"GGUF {hub_form}"
            uploaded_size, _ = _size_and_fit(hub_form, architecture, budget)
    return [
        ExportChoice(
            id="gguf",
            label=f"GGUF {file_type}",
            size=size,
            note="llama.cpp, LM Studio",
            detail=f"{checked}{about_type}",
            form="gguf",
            file_type=file_type,
            suffix=".gguf" if file_type == AUTO else f"-{file_type}.gguf",
            types=types,
        ),
        ExportChoice(
            id="ollama",
            label=f"Model in Ollama, {file_type}",
            size=size,
            note="ollama run NAME",
            detail="A GGUF file and its Modelfile in ~/models, given to `ollama create` if Ollama is "
            f"installed.{about_type}",
            form="ollama",
            file_type=file_type,
            target="Name",
            types=types,
        ),
        ExportChoice(
            id="merge",
            label="Merged model, 16-bit",
            size=merged,
            note="transformers, vLLM",
            detail="A folder with base and adapter as one model, compared with them before it gets its name.",
            form="merge",
            suffix="-merged",
            target="Folder",
        ),
        ExportChoice(
            id="adapter",
            label="Adapter folder",
            size=adapter_size,
            note="vLLM, peft",
            detail="A copy of the adapter, checked against what vLLM can serve.",
            form="adapter",
            suffix="-adapter",
            target="Folder",
        ),
        ExportChoice(
            id="hub",
            label=f"Upload {uploaded}",
            size=uploaded_size,
            note="Hugging Face Hub",
            detail="With a model card, to a private repository: name or owner/name. Needs HF_TOKEN or "
            "`hf auth login`.",
            form=form,
            file_type=hub_form if form == "hub-gguf" else "",
            target="Repository",
            types=(*HUB_FORMS, *types),
        ),
    ]


def _about_type(kind: str, architecture: Architecture | None) -> str:
    """Return what is special about a type, in a sentence; empty for nothing."""
    if kind == AUTO:
        return _AUTO
    return _larger_types(architecture) if architecture is not None and kind in K_QUANTS else ""


def _larger_types(architecture: Architecture) -> str:
    """Say that llama.cpp stores some matrices as larger types; empty where it does not."""
    lengths = " and ".join(f"{length:,}" for length in rows_without_k_blocks(architecture))
    if not lengths:
        return ""
    return f" llama.cpp stores rows of {lengths} weights, not whole blocks of 256, as larger types."


def _size_and_fit(kind: str, architecture: Architecture | None, budget: MemoryBudget) -> tuple[str, str]:
    """Return the approximate size of a file, and a sentence on where it runs; empty where unknown."""
    if architecture is None or kind == AUTO:
        return "", ""
    needed = bytes_to_run(architecture, kind)
    verb = "Fits" if needed <= budget.bytes else "Does not fit"
    size = f"≈ {format_bytes(estimated_bytes(architecture, kind))}"
    return size, f" {verb} {budget.name} at a context of 4,096 tokens (≈ {format_bytes(needed)})."


def proposed_target(choice: ExportChoice, run_name: str, checkpoint: int | None = None) -> str:
    """Return a path in the user's home that does not exist yet, or a name."""
    stem = re.sub(r"[^\w.-]+", "-", run_name).strip("-") or "adapter"
    if checkpoint is not None:
        stem += f"-step-{checkpoint}"
    if choice.target in _NAMES:
        return stem.lower()
    folder = Path.home() / "models"
    path, number = folder / f"{stem}{choice.suffix}", 2
    while path.exists():
        path = folder / f"{stem}-{number}{choice.suffix}"
        number += 1
    return home_relative(str(path))


def home_relative(path: str) -> str:
    """Return a path with ``~`` for the user's home."""
    home = f"{Path.home()}/"
    return f"~/{path.removeprefix(home)}" if path.startswith(home) else path


def request_for(
    choice: ExportChoice,
    out: str,
    checkpoint: int | None = None,
) -> ExportRequest:
    """Return the request for a choice. ``out`` is as typed."""
    target = out.strip()
    if choice.target not in _NAMES:
        target = str(Path(target).expanduser().absolute())
    return ExportRequest(
        form=choice.form,
        out=target,
        file_type=choice.file_type,
        checkpoint=checkpoint,
    )


def choice_line(choice: ExportChoice) -> Content:
    """Return the line of a choice."""
    return Content.assemble(f"{choice.label:<29}{choice.size:>10}  ", (choice.note, "dim"))


def export_line(export: Export, width: int = _LINE_WIDTH) -> Content:
    """Return the line of an export that was started before, in so many cells."""
    status = export.status
    sign, style = _SIGNS.get(status.state, ("·", "dim"))
    elapsed = f" · {format_duration(time.time() - status.began)}" if status.began else ""
    said = {
        "running": f"{status.activity}{elapsed}",
        "finished": f"{format_bytes(status.bytes)}  {home_relative(export.request.out)}",
        "failed": status.problem.partition("\n")[0],
        "canceled": "canceled",
    }[status.state]
    begin = f"{export.name}  "
    return Content.assemble(
        (f"{sign} ", style), begin, (truncate_middle(said, max(8, width - len(sign) - 1 - len(begin))), "dim")
    )


def export_detail(export: Export) -> str:
    """Return what is known of an export, in sentences."""
    status = export.status
    match status.state:
        case "finished":
            paths = ", ".join(map(home_relative, status.paths))
            size = format_bytes(status.bytes)
            return "\n".join(filter(None, (f"{size} in {paths}", status.summary, status.command)))
        case "running":
            return "\n".join(filter(None, (status.activity, status.note)))
        case "failed":
            written = f"Written: {', '.join(map(home_relative, status.paths))}" if status.paths else ""
            return "\n".join(filter(None, (status.problem, written, status.summary)))
        case "canceled" if status.paths:
            return f"It was canceled when it was already complete: {', '.join(status.paths)}"
        case "canceled":
            return "It was canceled and left nothing behind."
