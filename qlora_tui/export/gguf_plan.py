"""What ``export gguf`` checks before it computes anything: types, names of the files, and disk space."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qlora_tui.catalog.gguf import AUTO, FILE_TYPES, K_QUANTS, estimated_bytes
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.export.gguf_file.writer import FileContent
from qlora_tui.export.llama_cpp.client import unavailable_because
from qlora_tui.export.unfinished_files import refuse_existing, require_space
from qlora_tui.formatting import short_model_name

_PROVED_ALONE = ("F16", "BF16", "Q8_0")
"""Types whose rounding hides no mistake; of the others a 16-bit file is proved first."""
_SPARE_BYTES = 64 << 20


def needs_bf16(file_type: str, *, is_checked: bool) -> bool:
    """Return whether a type is made from a 16-bit file, or one is checked before it."""
    return file_type in K_QUANTS or (is_checked and file_type not in _PROVED_ALONE)


def require_file_space(
    source: ChatSource,
    content: FileContent,
    out: Path,
    kinds: Sequence[str],
    is_auto: bool,
) -> None:
    """Raise UserError where the disk lacks space for the files and what they are made and checked with."""
    architecture = resolve_model(source.recipe.model.id).architecture
    sizes = [
        estimated_bytes(architecture, kind) if kind in K_QUANTS else content.size(kind)  # type: ignore[arg-type]
        for kind in kinds
    ]
    # auto keeps one file at a time.
    needed = max(sizes) if is_auto else sum(sizes)
    is_checked = not unavailable_because()
    if "BF16" not in kinds and any(needs_bf16(kind, is_checked=is_checked) for kind in kinds):
        needed += content.size("BF16")
    require_space(out.parent, needed + _SPARE_BYTES, "The export")


def check_file_types(kinds: Sequence[str], is_auto: bool) -> None:
    """Raise UserError for an unknown type, and for one that needs llama.cpp where it cannot be used."""
    known = (*FILE_TYPES, *K_QUANTS)
    if AUTO in kinds:
        raise UserError(
            "auto and another type?",
            what="auto chooses the type itself, and others were asked for beside it.",
            fix="Name auto alone, or the types without it.",
            exit_code=EXIT_USAGE,
        )
    for kind in kinds:
        if kind not in known:
            raise UserError(
                "Unknown file type",
                what=f"{kind} is not a type that can be written.",
                fix=f"Choose from {', '.join(known)}, or auto alone.",
                exit_code=EXIT_USAGE,
            )
    needs_llama_cpp = is_auto or any(kind in K_QUANTS for kind in kinds)
    if needs_llama_cpp and (reason := unavailable_because()):
        raise UserError(
            "llama.cpp is not available",
            what="The K types and auto are made by llama.cpp itself.",
            why=f"{reason}.",
            fix=f"Without it, choose from {', '.join(FILE_TYPES)}.",
            exit_code=EXIT_USAGE,
        )


def final_paths(
    source: ChatSource, adapter_name: str, out: Path, kinds: Sequence[str], is_auto: bool
) -> dict[str, Path]:
    """Return the final path of each type. Raises UserError where one exists."""
    if out.suffix == ".gguf":
        if len(kinds) > 1 and not is_auto:
            raise UserError(
                "One file for several types?",
                what=f"{out} names one file, and {len(kinds)} types are asked for.",
                fix="Name a folder; each file in it is named after its type.",
                exit_code=EXIT_USAGE,
            )
        paths = dict.fromkeys(kinds, out)
    else:
        base = source.recipe.name or f"{short_model_name(source.recipe.model.id)}-{adapter_name}"
        stem = re.sub(r"[^\w.-]+", "-", base).strip("-")
        paths = {kind: out / f"{stem}-{kind}.gguf" for kind in kinds}
    for path in paths.values():
        refuse_existing(path)
    return paths
