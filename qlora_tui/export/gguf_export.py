"""``export gguf``: GGUF files of a run's base with its adapter merged in, each checked by llama.cpp."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePath

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.catalog.gguf_file_types import (
    AUTO,
    FILE_TYPES,
    K_QUANTS,
    LADDER,
    FileType,
    estimated_bytes,
    next_larger,
)
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import chat_tokenizer, every_tenth
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.export.base_choice import BaseChoice, base_requantizer, choose_base
from qlora_tui.export.gguf_file.content import gguf_content
from qlora_tui.export.gguf_file.stored_types import StoredTypes, stored_types
from qlora_tui.export.gguf_file.writer import FileContent, write_gguf
from qlora_tui.export.llama_cpp.bindings import is_installed
from qlora_tui.export.llama_cpp.jobs import Quantize
from qlora_tui.export.llama_cpp.llama_process import INSTALL_HINT, quantize
from qlora_tui.export.merged_weights import MergedWeights, merged_weights
from qlora_tui.export.proof import Proof, prove
from qlora_tui.export.reference import Reference, reference_bytes, reference_or_reason
from qlora_tui.export.unfinished_files import draft_folder, publish_files, refuse_existing, require_space

_PROVED_ALONE = ("F16", "BF16", "Q8_0")
"""Types whose rounding hides no mistake; of the others a 16-bit file is proved first."""
DEFAULT_WITHIN = 0.03
"""Largest mean KL divergence, in nats, of the file that ``auto`` keeps."""
_SPARE_BYTES = 64 << 20

StatusFn = Callable[[str], None]


class GgufFile(Struct, frozen=True, kw_only=True):
    """One written file."""

    path: str
    file_type: str
    bytes: int
    types: StoredTypes
    """Types of its matrices."""
    proof: Proof | None = None
    """None where llama.cpp did not check it."""


class GgufExport(Struct, frozen=True, kw_only=True):
    """Result of an export."""

    files: tuple[GgufFile, ...]
    base: BaseChoice
    notes: tuple[str, ...] = ()
    unchecked_because: str = ""
    """Why llama.cpp did not check the files, and how to check them; empty if it did."""

    @property
    def summary(self) -> str:
        """Say how the files were checked and what was merged, a sentence a line."""
        lines = [f"{file.proof.prompts_sentence}." for file in self.files[:1] if file.proof]
        return "\n".join([*self.sentences, *lines])

    @property
    def sentences(self) -> list[str]:
        """Return the summary without what only programs with llama.cpp's own prompts are concerned with."""
        lines = [f"{file.proof.sentence}." for file in self.files if file.proof]
        lines += [
            _turn_ends_warning(file.file_type)
            for file in self.files
            if file.proof and file.proof.loses_turn_ends
        ]
        lines += [f"{file.file_type}: {file.types.sentence}." for file in self.files if file.types.sentence]
        if self.unchecked_because:
            lines.append(f"Not checked: {self.unchecked_because}.")
        return [*lines, *filter(None, (self.base.sentence, *self.notes))]

    @property
    def command(self) -> str:
        """Return the command that runs the first file."""
        return f"llama-server -m {shlex.quote(self.files[0].path)}"


def export_gguf(
    source: ChatSource,
    adapter_name: str,
    out: Path,
    file_types: Sequence[str],
    *,
    within: float | None = None,
    on_status: StatusFn = lambda words: None,
) -> GgufExport:
    """Write one GGUF file per type; a file that differs from the adapter's answers is deleted.

    Args:
        source: The base and its adapters.
        adapter_name: The adapter to merge.
        out: A file ending in ``.gguf`` for one type, or a folder for any number.
        file_types: Types of :mod:`qlora_tui.catalog.gguf_file_types`, or ``auto`` alone.
        within: Largest mean KL divergence to accept, in nats.
        on_status: Called with the current activity.

    Raises:
        UserError: nothing is left under the names asked for.
    """
    is_auto = tuple(file_types) == (AUTO,)
    kinds = LADDER if is_auto else tuple(dict.fromkeys(file_types))
    check_file_types(kinds, is_auto)
    if is_auto and within is None:
        within = DEFAULT_WITHIN
    targets = _targets(source, adapter_name, out, kinds, is_auto)
    weights = merged_weights(source, adapter_name, on_status)
    tokenizer = chat_tokenizer(source, weights.folder)
    content = gguf_content(source, tokenizer, weights)
    _require_space(source, content, out, kinds, is_auto)
    with draft_folder(out) as draft, ExitStack() as stack:
        reference = reference_or_reason(stack, source, adapter_name, draft, on_status)
        base = choose_base(source, adapter_name, reference, on_status)
        if base.chosen == "dequantized":
            weights = MergedWeights(weights.folder, weights.updates, base_requantizer(source, base))
            content = gguf_content(source, tokenizer, weights)
        unchecked = "" if is_installed() else f"llama.cpp is not installed. {INSTALL_HINT}".rstrip(".")
        if isinstance(reference, str):
            unchecked = reference
        if within is not None and unchecked:
            raise UserError(
                "The bound cannot be checked",
                what=f"llama.cpp cannot compare the files with the adapter. {unchecked}.",
                fix="Name a type without --within, such as --quant Q8_0.",
            )
        job = _Export(content, draft, reference if is_installed() else "", within, on_status)
        files = job.smallest_within(kinds) if is_auto else tuple(map(job.write, kinds))
        publish_files({Path(file.path): targets[file.file_type] for file in files})
        published = tuple(replace(file, path=str(targets[file.file_type])) for file in files)
    return GgufExport(files=published, base=base, notes=content.notes, unchecked_because=unchecked)


@dataclass
class _Export:
    """Writes files of one content to a draft folder."""

    content: FileContent
    draft: Path
    reference: Reference | str
    """A text where the files are not checked."""
    within: float | None
    on_status: StatusFn
    _bf16: GgufFile | None = None

    def write(self, file_type: str) -> GgufFile:
        """Write and check one file. Raises UserError."""
        file = self._write(file_type)
        problem = file.proof.problem if file.proof else ""
        if (
            file.proof
            and not problem
            and self.within is not None
            and not file.proof.divergence <= self.within
        ):
            problem = f"its KL divergence is {file.proof.divergence:.2g}, and {self.within:g} was asked for"
        if problem:
            Path(file.path).unlink()
            raise _refused(file_type, problem)
        return file

    def smallest_within(self, kinds: Sequence[str]) -> tuple[GgufFile]:
        """Write files from the smallest up, and keep the first within the bound. Raises UserError."""
        assert self.within is not None
        if not isinstance(self.reference, Reference):
            raise UserError(
                "No type can be chosen",
                what=f"There is nothing to compare the files with. {self.reference}.",
                fix="Name a type, such as --quant Q8_0.",
            )
        nearest: Proof | None = None
        for number, kind in enumerate(kinds, 1):
            self.on_status(f"Trying {kind} ({number} of at most {len(kinds)})")
            file = self._write(kind)
            assert file.proof is not None
            is_near = file.proof.divergence <= self.within and not file.proof.loses_turn_ends
            if not file.proof.problem and is_near:
                return (file,)
            nearest = file.proof
            Path(file.path).unlink()
        assert nearest is not None
        raise UserError(
            "No type is within the bound",
            what=f"The nearest: {nearest.sentence}; a KL divergence of {self.within:g} was asked for, and "
            "as many turn ends.",
            fix="Raise --within, or export as F16.",
        )

    def _write(self, file_type: str) -> GgufFile:
        if file_type == "BF16":
            return self._write_bf16()
        path = self.draft / f"{file_type}.gguf"
        if needs_bf16(file_type, is_checked=isinstance(self.reference, Reference)):
            # It shows mistakes that the rounding of few bits would hide, and llama.cpp quantizes it.
            unquantized = self._write_bf16()
            if unquantized.proof and unquantized.proof.problem:
                raise _refused("BF16", unquantized.proof.problem)
        if file_type in K_QUANTS:
            self.on_status(f"Quantizing to {file_type}")
            quantize(Quantize(unquantized.path, str(path), file_type))
        else:
            kind: FileType = file_type  # type: ignore[assignment]  # checked by check_file_types
            write_gguf(self.content, path, kind, every_tenth(self.on_status, f"Writing {file_type}"))
        return self._checked(path, file_type)

    def _write_bf16(self) -> GgufFile:
        """Write and check the 16-bit file, once."""
        if self._bf16 is None:
            path = self.draft / "BF16.gguf"
            write_gguf(self.content, path, "BF16", every_tenth(self.on_status, "Writing BF16"))
            self._bf16 = self._checked(path, "BF16")
        return self._bf16

    def _checked(self, path: Path, file_type: str) -> GgufFile:
        return GgufFile(
            path=str(path),
            file_type=file_type,
            bytes=path.stat().st_size,
            types=stored_types(path, file_type),
            proof=self._prove(path, file_type),
        )

    def _prove(self, path: Path, file_type: str) -> Proof | None:
        if not isinstance(self.reference, Reference):
            return None
        words = f"Asking llama.cpp what the {file_type} file answers"
        self.on_status(words)
        differences = self.content.vocabulary.differences
        on_progress = every_tenth(self.on_status, words)
        return prove(self.reference, path, file_type, differences, on_progress=on_progress)


def needs_bf16(file_type: str, *, is_checked: bool) -> bool:
    """Return whether a type is made from a 16-bit file, or one is checked before it."""
    return file_type in K_QUANTS or (is_checked and file_type not in _PROVED_ALONE)


def _turn_ends_warning(file_type: str) -> str:
    larger = next_larger(file_type)
    advice = f" Try a larger type: {larger}." if larger else ""
    return f"{file_type} ends fewer turns than the adapter: some answers will run on.{advice}"


def _refused(file_type: str, problem: str) -> UserError:
    return UserError(
        "The GGUF file does not answer as the adapter does",
        what=f"{file_type}: {problem}.",
        fix="Choose a larger type, such as Q8_0."
        if file_type not in ("F16", "BF16", "Q8_0")
        else "Use the adapter or `qlora-tui export merge`, and report the model.",
    )


def _require_space(
    source: ChatSource, content: FileContent, out: Path, kinds: Sequence[str], is_auto: bool
) -> None:
    """Raise UserError where the disk lacks space for the files and what they are made and checked with."""
    architecture = resolve_model(source.recipe.model.id).architecture
    sizes = [
        estimated_bytes(architecture, kind) if kind in K_QUANTS else content.size(kind)  # type: ignore[arg-type]
        for kind in kinds
    ]
    # auto keeps one file at a time.
    needed = max(sizes) if is_auto else sum(sizes)
    if "BF16" not in kinds and any(needs_bf16(kind, is_checked=is_installed()) for kind in kinds):
        needed += content.size("BF16")
    if is_installed():
        needed += reference_bytes(len(content.vocabulary.tokens))
    require_space(out.parent, needed + _SPARE_BYTES, "The export")


def check_file_types(kinds: Sequence[str], is_auto: bool) -> None:
    """Raise UserError for an unknown type, and for one that needs llama.cpp where it is missing."""
    known = (*FILE_TYPES, *K_QUANTS)
    for kind in kinds:
        if kind not in known:
            raise UserError(
                "Unknown file type",
                what=f"{kind} is not a type that can be written.",
                fix=f"Choose from {', '.join(known)}, or auto alone.",
                exit_code=EXIT_USAGE,
            )
    if not is_installed() and (is_auto or any(kind in K_QUANTS for kind in kinds)):
        raise UserError(
            "llama.cpp is not installed",
            what="The K types and auto are made by llama.cpp itself.",
            fix=f"{INSTALL_HINT} Without it, choose from {', '.join(FILE_TYPES)}.",
            exit_code=EXIT_USAGE,
        )


def _targets(
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
        base = source.recipe.name or f"{PurePath(source.recipe.model.id).name}-{adapter_name}"
        stem = re.sub(r"[^\w.-]+", "-", base).strip("-")
        paths = {kind: out / f"{stem}-{kind}.gguf" for kind in kinds}
    for path in paths.values():
        refuse_existing(path)
    return paths
