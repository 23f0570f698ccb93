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
from qlora_tui.export.llama_cpp.availability import install_hint, is_installed
from qlora_tui.formatting import format_bytes, format_duration, truncate_middle
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.runs.exports import COMPARED_TOKENS, Export, ExportRequest, Form, can_resume, output_path

_TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
_NEED_LLAMA_CPP = (AUTO, "Q4_K_M", "Q5_K_M", "Q6_K")
_SIGNS = {"running": ("▸", "$primary"), "finished": ("✓", "$success"), "failed": ("✗", "$error")}
_AUTO = (
    "The smallest type that still answers like your adapter: tries them from the smallest up, and keeps the "
    "first within a KL divergence of 0.03, as llama.cpp computes it."
)
_HUB = "To a private repository: name or owner/name. Needs HF_TOKEN or `hf auth login`."
_RESUMABLE = "What is complete is not done again; it is deleted after 7 days, and by [D]."
_LINE_WIDTH = 66
"""Cells of an export's line, so that it fits 80 columns."""
_PROGRAMS = "llama.cpp, LM Studio"


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
    has_type_key: bool = False
    """Whether a key changes the file type; other GGUF types are separate choices."""
    is_available: bool = True

    @property
    def is_compared(self) -> bool:
        """Whether the answers of what is written are compared with the adapter's."""
        return self.form not in ("adapter", "hub-adapter")


def file_types() -> list[str]:
    """Return the types that can be written on this machine, the largest of the first choice last."""
    return [kind for kind in (*_TYPES, AUTO) if _is_writable(kind)]


def export_choices(
    architecture: Architecture | None, budget: MemoryBudget, adapter_bytes: int, file_type: str = "Q8_0"
) -> list[ExportChoice]:
    """Return every choice, the most useful first; sizes need the model's architecture.

    ``file_type`` is that of a model in Ollama and of a GGUF file on the Hub.
    """
    adapter_size = format_bytes(adapter_bytes)
    merged = "" if architecture is None else format_bytes(architecture.total_params * 2)
    size, fit = _size_and_fit(file_type, architecture, budget)
    return [
        *(_gguf(kind, architecture, budget) for kind in (AUTO, *_TYPES)),
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
            id="lora",
            label="LoRA as GGUF",
            size=adapter_size,
            note="llama.cpp --lora",
            detail="The adapter alone, for llama.cpp beside a GGUF file of the base.",
            form="lora",
            suffix="-lora.gguf",
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
            id="ollama",
            label=f"Model in Ollama, {file_type}",
            size=size,
            note="ollama run NAME",
            detail="A GGUF file and its Modelfile in ~/models, given to `ollama create` where Ollama is "
            f"installed.{fit}",
            form="ollama",
            file_type=file_type,
            target="Name",
            has_type_key=True,
        ),
        ExportChoice(
            id="hub-adapter",
            label="Upload the adapter",
            size=adapter_size,
            note="Hugging Face Hub",
            detail=f"The adapter with a model card. {_HUB}",
            form="hub-adapter",
            target="Repository",
        ),
        ExportChoice(
            id="hub-merged",
            label="Upload the merged model",
            size=merged,
            note="Hugging Face Hub",
            detail=f"Base and adapter as one 16-bit model with a model card. {_HUB}",
            form="hub-merged",
            target="Repository",
        ),
        ExportChoice(
            id="hub-gguf",
            label=f"Upload a GGUF file, {file_type}",
            size=size,
            note="Hugging Face Hub",
            detail=f"The merged model as GGUF file with a model card. {_HUB}",
            form="hub-gguf",
            file_type=file_type,
            target="Repository",
            has_type_key=True,
        ),
    ]


def _gguf(kind: str, architecture: Architecture | None, budget: MemoryBudget) -> ExportChoice:
    size, fit = _size_and_fit(kind, architecture, budget)
    if not _is_writable(kind):
        detail = f"Needs llama.cpp. {install_hint()}"
    elif kind == AUTO:
        detail = _AUTO
    else:
        checked = "llama.cpp then compares the file with your adapter's answers."
        detail = f"{checked if is_installed() else 'Not checked: llama.cpp is not installed.'}{fit}"
        if architecture is not None and kind in K_QUANTS:
            detail += _larger_types(architecture)
    return ExportChoice(
        id=kind,
        label="GGUF, type chosen for you" if kind == AUTO else f"GGUF {kind}",
        size=size,
        note=_PROGRAMS,
        detail=detail,
        form="gguf",
        file_type=kind,
        suffix=".gguf" if kind == AUTO else f"-{kind}.gguf",
        is_available=_is_writable(kind),
    )


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


def _is_writable(kind: str) -> bool:
    return kind not in _NEED_LLAMA_CPP or is_installed()


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
    compared_tokens: int = COMPARED_TOKENS,
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
        compared_tokens=compared_tokens,
    )


def choice_line(choice: ExportChoice) -> Content:
    """Return the line of a choice."""
    style = "" if choice.is_available else "dim"
    return Content.assemble((f"{choice.label:<29}{choice.size:>10}  ", style), (choice.note, "dim"))


def export_line(export: Export, width: int = _LINE_WIDTH) -> Content:
    """Return the line of an export that was started before, in so many cells."""
    status = export.status
    sign, style = _SIGNS.get(status.state, ("·", "dim"))
    elapsed = f" · {format_duration(time.time() - status.began)}" if status.began else ""
    said = {
        "running": f"{status.activity}{elapsed}",
        "finished": f"{format_bytes(status.bytes)}  {home_relative(export.request.out)}",
        "failed": status.problem.partition("\n")[0],
        "canceled": _canceled(export),
    }[status.state]
    begin = f"{export.name}  "
    return Content.assemble(
        (f"{sign} ", style), begin, (truncate_middle(said, max(8, width - len(sign) - 1 - len(begin))), "dim")
    )


def _canceled(export: Export) -> str:
    """Return where an export was canceled, and the key that resumes it."""
    if not can_resume(export):
        return "canceled"
    activity = export.status.activity
    return f"canceled at: {activity}, [r] resumes" if activity else "canceled, [r] resumes"


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
            rest = f"[r] resumes. {_RESUMABLE}" if can_resume(export) else ""
            return "\n".join(filter(None, (status.problem, written, status.summary, rest)))
        case "canceled" if status.paths:
            return f"It was canceled when it was already complete: {', '.join(status.paths)}"
        case "canceled" if output_path(export.request) is None:
            return "It was canceled. What is complete is not done again, nor sent again if the Hub has it."
        case "canceled" if can_resume(export):
            where = f" at: {status.activity}" if status.activity else ""
            return f"It was canceled{where}. [r] resumes. {_RESUMABLE}"
        case "canceled":
            return "It was canceled and left nothing behind."
