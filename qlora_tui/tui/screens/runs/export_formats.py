"""The formats to which a run can be exported: the size and the purpose of each, and whether this machine can
write it. The export dialog uses this module.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.gguf_file_types import (
    AUTO,
    OFFERED,
    bytes_to_run,
    estimated_bytes,
    needs_llama_cpp,
    rows_without_k_blocks,
    size_from_parameters,
)
from qlora_tui.catalog.local_models import (
    ModelNotFoundError,
    find_files,
    is_fetchable,
    load_architecture,
)
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.client import install_hint, is_installed
from qlora_tui.formatting import abbreviate_home, format_bytes, format_path, join_words
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import first_event
from qlora_tui.runs.events import AdapterReady
from qlora_tui.runs.exports import ExportRequest, Form
from qlora_tui.tui.screens.models.model_facts import disk_free_bytes

HUB_FORMS = ("adapter", "merged")
"""Forms of a run that can be uploaded to the Hub, besides GGUF files."""


Target: TypeAlias = Literal["File", "Folder", "Name", "Repository"]


_NAMES: tuple[Target, ...] = ("Name", "Repository")
_WITHOUT_BASE: tuple[Form, ...] = ("adapter", "hub-adapter")
"""Forms that contain no weights of the base model."""


@dataclass(frozen=True)
class Base:
    """The base model of a run's adapter, with what is known about it on this machine."""

    id: str
    architecture: Architecture | None = None
    """Architecture from the model's ``config.json``; None if this file is not on this machine."""
    parameters: int = 0
    """Number of the model's parameters, from ``config.json`` or else from the run's events; 0 if unknown."""
    refusal: UserError | None = None
    """Why the model's weights cannot be used on this machine; None if they can."""

    @property
    def can_download(self) -> bool:
        """Whether the Hub has the files that this machine lacks."""
        is_missing = isinstance(self.refusal, ModelNotFoundError | MissingFilesError)
        return is_missing and is_fetchable(self.id)

    @property
    def merged_bytes(self) -> int | None:
        """Size in bytes of the model in 16 bits; None if unknown."""
        return self.parameters * 2 or None

    def gguf_bytes(self, file_type: str) -> int | None:
        """Return the approximate size in bytes of a GGUF file of this type; None if unknown."""
        if file_type == AUTO or not self.parameters:
            return None
        if self.architecture is None:
            return size_from_parameters(self.parameters, file_type)
        return estimated_bytes(self.architecture, file_type)


def base_of(run: RunDir) -> Base:
    """Return the base model of a run. Raises UserError if the run's recipe cannot be read."""
    id_ = run.recipe().model.id
    try:
        architecture = find_files(id_).architecture
        return Base(id_, architecture, architecture.total_params)
    except UserError as problem:
        refusal = problem
    with suppress(UserError):
        architecture = load_architecture(id_)
        return Base(id_, architecture, architecture.total_params, refusal)
    attached = first_event(run.events_path, AdapterReady)
    return Base(id_, None, attached.total_parameters if attached else 0, refusal)


@dataclass(frozen=True)
class ExportChoice:
    """A format to which a run can be exported."""

    id: str
    label: str
    bytes: int | None
    """Size of the export in bytes; None if unknown."""
    note: str
    """What the format is best for, in a few words."""
    detail: str
    """Description of the format, in full sentences."""
    form: Form
    is_estimate: bool = True
    """Whether ``bytes`` is computed from the model's parameters. If not, it was read from a file."""
    file_type: str = ""
    suffix: str = ""
    """Ending of the proposed file name."""
    target: Target = "File"
    """Kind of target that the user is asked for."""
    types: tuple[str, ...] = ()
    """Options that a key selects in turn: types of a GGUF file, or forms of an upload; empty if there are
    none.
    """
    missing_base: Base | None = None
    """The base model, if the format contains its weights and this machine cannot use them; otherwise None."""

    @property
    def size(self) -> str:
        """Size to show: an estimate such as ``~7.6 GiB``, an exact size such as ``155 MiB``, ``varies``, or
        ``unknown``.
        """
        if self.bytes is None:
            return "varies" if self.file_type == AUTO else "unknown"
        return f"{'~' * self.is_estimate}{format_bytes(self.bytes)}"

    @property
    def blocked(self) -> str:
        """What the export lacks: the size of the base model to download, such as ``14.3 GiB`` or ``unknown``,
        or ``✗ no base model`` if it cannot be downloaded; empty if nothing is lacking.
        """
        base = self.missing_base
        if base is None:
            return ""
        if not base.can_download:
            return "✗ no base model"
        return format_bytes(base.merged_bytes) if base.merged_bytes else "unknown"


def export_choices(
    base: Base,
    budget: MemoryBudget,
    adapter_bytes: int | None,
    file_type: str = OFFERED[0],
    hub_form: str = HUB_FORMS[0],
) -> list[ExportChoice]:
    """Return the formats, most useful first. Formats that this machine cannot write come last.

    Args:
        base: The base model of the run.
        budget: The memory that is available for running a GGUF file.
        adapter_bytes: Size of the adapter; None if unknown.
        file_type: Type of the GGUF files.
        hub_form: The form to upload: one of :data:`HUB_FORMS`, or the type of a GGUF file.
    """
    types = tuple(kind for kind in OFFERED if is_installed() or not needs_llama_cpp(kind))
    size, about_type = base.gguf_bytes(file_type), _about_type(file_type, base.architecture, budget)
    if is_installed():
        checked = "llama.cpp then compares the file with your adapter's answers."
    else:
        checked = f"Without llama.cpp, files are not checked and smaller types are missing. {install_hint()}"
    uploads: dict[str, tuple[Form, str, int | None]] = {
        "adapter": ("hub-adapter", "the adapter", adapter_bytes),
        "merged": ("hub-merged", "the merged model", base.merged_bytes),
    }
    if hub_form not in uploads:
        uploads[hub_form] = ("hub-gguf", f"GGUF {hub_form}", base.gguf_bytes(hub_form))
    form, uploaded, uploaded_size = uploads[hub_form]
    choices = [
        ExportChoice(
            "gguf",
            f"GGUF {file_type}",
            size,
            "llama.cpp, LM Studio",
            f"{checked}{about_type}",
            "gguf",
            file_type=file_type,
            suffix=".gguf" if file_type == AUTO else f"-{file_type}.gguf",
            types=types,
        ),
        ExportChoice(
            "ollama",
            f"Model in Ollama, {file_type}",
            size,
            "ollama run",
            "A GGUF file and its Modelfile in ~/models. If Ollama is installed, `ollama create` imports the "
            f"model.{about_type}",
            "ollama",
            file_type=file_type,
            target="Name",
            types=types,
        ),
        ExportChoice(
            "merge",
            "Merged model, 16-bit",
            base.merged_bytes,
            "transformers, vLLM",
            "A folder with the base model and the adapter merged into one model. The merged model is checked "
            "against base + adapter before it is saved.",
            "merge",
            suffix="-merged",
            target="Folder",
        ),
        ExportChoice(
            "adapter",
            "Adapter folder",
            adapter_bytes,
            "several adapters in vLLM, peft",
            "A copy of the adapter, checked for compatibility with vLLM.",
            "adapter",
            is_estimate=False,
            suffix="-adapter",
            target="Folder",
        ),
        ExportChoice(
            "hub",
            f"Upload {uploaded}",
            uploaded_size,
            "sharing on the Hugging Face Hub",
            "Uploads to a private repository, with a model card. Type the repository's name, or owner/name. "
            "Needs "
            "HF_TOKEN or `hf auth login`.",
            form,
            is_estimate=form != "hub-adapter",
            file_type=hub_form if form == "hub-gguf" else "",
            target="Repository",
            types=(*HUB_FORMS, *types),
        ),
    ]
    if base.refusal is None:
        return choices
    return [
        *(each for each in choices if each.form in _WITHOUT_BASE),
        *(replace(each, missing_base=base) for each in choices if each.form not in _WITHOUT_BASE),
    ]


def describe_choice(choice: ExportChoice) -> str:
    """Return a description of a format. If the format needs the base model and this machine cannot use that
    model, return sentences that say why and what to do about it.
    """
    base = choice.missing_base
    if base is None or base.refusal is None:
        return choice.detail
    what = abbreviate_home(f"This format contains the base model's weights. {base.refusal.what}")
    if not base.can_download:
        return f"{what} {abbreviate_home(base.refusal.why)}\n▸ {abbreviate_home(base.refusal.fix)}"
    size = f" (~{format_bytes(base.merged_bytes)})" if base.merged_bytes else ""
    return (
        f"{what}\n▸ Enter asks whether to download the base{size} on the Model screen. Export again "
        f"afterwards."
    )


def free_space(choice: ExportChoice) -> Content:
    """Return the free space on the disk of the proposed folder, as an error if the export does not fit. The
    text is empty if the free space is unknown, and for uploads.
    """
    free = disk_free_bytes(_folder())
    if free is None or choice.target == "Repository":
        return Content("")
    room = f"{format_bytes(free)} free for {format_path(_folder())}"
    if choice.bytes is not None and choice.bytes > free:
        return Content.styled(f"✗ only {room}", "$error")
    return Content(room)


def _about_type(kind: str, architecture: Architecture | None, budget: MemoryBudget) -> str:
    """Return sentences about the memory that a GGUF file of this type needs, and about tensors that llama.cpp
    stores as larger types. For the type ``auto``, return a sentence that explains ``auto``. For any other
    type, return an empty text if the architecture is unknown.
    """
    if kind == AUTO:
        return (
            " auto: the smallest type whose KL divergence from your adapter, as llama.cpp computes it, is at "
            "most 0.03."
        )
    if architecture is None:
        return ""
    needed = bytes_to_run(architecture, kind)
    verb = "Fits" if needed <= budget.bytes else "Does not fit"
    text = f" {verb} {budget.name} at a context of 4,096 tokens (~{format_bytes(needed)})."
    lengths = rows_without_k_blocks(architecture) if needs_llama_cpp(kind) else ()
    if lengths:
        rows = join_words([f"{length:,}" for length in lengths])
        text += (
            f" Row lengths of {rows} are not multiples of 256, so llama.cpp stores those tensors as "
            f"larger types."
        )
    return text


def _folder() -> Path:
    """Return the default folder for exports."""
    return Path.home() / "models"


def proposed_target(choice: ExportChoice, run_name: str, checkpoint: int | None = None) -> str:
    """Return an unused path in the default folder for exports. If the choice needs a name instead of a path,
    return a name derived from ``run_name``. ``checkpoint``: step of the checkpoint; None for the final
    adapter.
    """
    stem = re.sub(r"[^\w.-]+", "-", run_name).strip("-") or "adapter"
    if checkpoint is not None:
        stem += f"-step-{checkpoint}"
    if choice.target in _NAMES:
        return stem.lower()
    folder = _folder()
    path, number = folder / f"{stem}{choice.suffix}", 2
    while path.exists():
        path = folder / f"{stem}-{number}{choice.suffix}"
        number += 1
    return format_path(path)


def request_for(choice: ExportChoice, out: str, checkpoint: int | None = None) -> ExportRequest:
    """Return the request for an export. ``out``: the target as the user typed it. ``checkpoint``: step of the
    checkpoint; None for the final adapter.
    """
    is_name = choice.target in _NAMES
    target = out.strip() if is_name else str(Path(out.strip()).expanduser().absolute())
    return ExportRequest(form=choice.form, out=target, file_type=choice.file_type, checkpoint=checkpoint)
