"""Every form of export behind one function, and its result as sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.export.adapter_folder import export_adapter_folder
from qlora_tui.export.gguf import export_gguf
from qlora_tui.export.hub import export_hub
from qlora_tui.export.merge import merge
from qlora_tui.export.model_card import CardForm
from qlora_tui.export.ollama import export_ollama
from qlora_tui.formatting import format_bytes
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import ExportRequest, output_path


class Written(Struct, frozen=True, kw_only=True):
    """Result of an export."""

    result: Struct
    """The full result, for programs."""
    sizes: dict[str, int]
    """Size in bytes of each file, folder or repository."""
    summary: str
    """How the result was checked, in sentences."""
    command: str
    """Command that runs the result; empty for a repository."""
    verdict: str = ""
    """How close a GGUF file is to the adapter, in a few words; empty if nothing was compared."""
    command_does: Literal["Run", "Serve", "Create"] = "Run"
    file_type: str = ""
    """GGUF type of the first file of a GGUF or Ollama export; empty for other exports."""
    problem: str = ""
    """Which of the requested files could not be written although others were, and why."""

    @property
    def bytes(self) -> int:
        """Total size of the result."""
        return sum(self.sizes.values())

    @property
    def text(self) -> str:
        """Text to print in a terminal."""
        lines = [f"{path}: {format_bytes(size)}" for path, size in self.sizes.items()]
        command = f"{self.command_does} it: {self.command}" if self.command else ""
        return "\n".join(filter(None, (*lines, self.summary, command)))


def export_form(
    run: RunDir,
    request: ExportRequest,
    source: ChatSource,
    adapter_name: str,
    on_status: Callable[[str], None],
) -> Written:
    """Perform an export of a run. Raises UserError."""
    out = Path(request.out)
    match request.form:
        case "merge":
            merged = merge(
                source,
                adapter_name,
                out,
                on_status,
                base_name=request.base,
                compared_tokens=request.compared_tokens,
            )
            changed = f"{merged.changed_weights} weights changed by the {adapter_name}."
            return Written(
                result=merged,
                sizes={merged.folder: merged.bytes},
                summary="\n".join(filter(None, (changed, merged.base.sentence, merged.check_sentence))),
                command=merged.command,
                command_does="Serve",
            )
        case "gguf":
            kinds = request.file_type.split(",")
            gguf = export_gguf(
                source,
                adapter_name,
                out,
                kinds,
                within=request.within,
                compared_tokens=request.compared_tokens,
                on_status=on_status,
            )
            return Written(
                result=gguf,
                sizes={file.path: file.bytes for file in gguf.files},
                summary=gguf.summary,
                verdict=gguf.verdict,
                command=gguf.command,
                file_type=gguf.files[0].file_type,
                problem="\n".join(gguf.refused),
            )
        case "adapter":
            folder = export_adapter_folder(source, adapter_name, out)
            return Written(
                result=folder,
                sizes={folder.path: folder.bytes},
                summary=folder.summary,
                command=folder.command,
                command_does="Serve",
            )
        case "ollama":
            target = output_path(request)
            assert target is not None
            model = export_ollama(
                source,
                adapter_name,
                request.out,
                target,
                request.file_type,
                replace_model=request.replace_model,
                compared_tokens=request.compared_tokens,
                on_status=on_status,
            )
            return Written(
                result=model,
                sizes={model.folder: sum(file.bytes for file in model.gguf.files)},
                summary=model.summary,
                verdict=model.gguf.verdict,
                command=model.command,
                command_does="Run" if model.created else "Create",
                file_type=model.gguf.files[0].file_type,
            )
        case "hub-adapter" | "hub-merged" | "hub-gguf":
            forms: dict[str, CardForm] = {
                "hub-adapter": "adapter",
                "hub-merged": "merged",
                "hub-gguf": "gguf",
            }
            uploaded = export_hub(
                run,
                source,
                adapter_name,
                request.out,
                forms[request.form],
                request.file_type,
                is_public=request.is_public,
                compared_tokens=request.compared_tokens,
                on_status=on_status,
            )
            sizes = {uploaded.url: uploaded.bytes}
            return Written(result=uploaded, sizes=sizes, summary=uploaded.summary, command="")
