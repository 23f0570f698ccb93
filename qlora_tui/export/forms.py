"""Every form of export behind one function, and its result as sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.export.adapter_folder import export_adapter_folder
from qlora_tui.export.gguf_export import export_gguf
from qlora_tui.export.hub_export import export_hub
from qlora_tui.export.lora_export import export_lora
from qlora_tui.export.merge import merge
from qlora_tui.export.model_card import CardForm
from qlora_tui.export.ollama_export import export_ollama
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import ExportRequest, ollama_folder


class Written(Struct, frozen=True):
    """What an export wrote."""

    paths: tuple[str, ...]
    bytes: int
    summary: str
    """How it was checked, in sentences."""
    command: str
    """The command that runs it."""
    file_type: str = ""
    """GGUF type of a single file."""


def export_form(
    run: RunDir,
    request: ExportRequest,
    source: ChatSource,
    adapter_name: str,
    on_status: Callable[[str], None],
) -> Written:
    """Do an export of a run. Raises UserError."""
    out = Path(request.out)
    match request.form:
        case "merge":
            merged = merge(source, adapter_name, out, on_status)
            summary = "\n".join(filter(None, (merged.check_sentence, merged.base.sentence)))
            return Written((merged.folder,), merged.bytes, summary, f"vllm serve {out}")
        case "gguf":
            written = export_gguf(source, adapter_name, out, (request.file_type,), on_status=on_status)
            paths = tuple(file.path for file in written.files)
            size = sum(file.bytes for file in written.files)
            kind = written.files[0].file_type
            return Written(paths, size, written.summary, written.command, kind)
        case "lora":
            lora = export_lora(source, adapter_name, out, on_status)
            return Written((lora.path,), lora.bytes, lora.summary, lora.command)
        case "adapter":
            folder = export_adapter_folder(source, adapter_name, out)
            return Written((folder.path,), folder.bytes, f"Rank {folder.rank}.", folder.command)
        case "ollama":
            name = request.out
            model = export_ollama(
                source,
                adapter_name,
                name,
                ollama_folder(name),
                request.file_type,
                on_status=on_status,
            )
            size = sum(file.bytes for file in model.gguf.files)
            return Written((model.folder,), size, model.summary, model.command)
        case "hub-adapter" | "hub-gguf":
            form: CardForm = "adapter" if request.form == "hub-adapter" else "gguf"
            uploaded = export_hub(
                run, source, adapter_name, request.out, form, request.file_type, on_status=on_status
            )
            return Written((uploaded.url,), uploaded.bytes, uploaded.summary, "")
