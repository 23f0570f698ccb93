"""``export gguf``: GGUF files of a run's base with its adapter merged in, each checked by llama.cpp.

Types, file names and disk space are checked before anything is computed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.adapters.base_weights import every_tenth
from qlora_tui.adapters.merged_weights import MergedWeights, merged_weights
from qlora_tui.catalog.gguf_file_types import (
    AUTO,
    DEFAULT_TYPE,
    LADDER,
    estimated_bytes,
    find_file_type,
    needs_llama_cpp,
    next_larger,
    types_without_llama_cpp,
)
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.loading import chat_tokenizer
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.export.base_choice import BaseChoice, base_requantizer, choose_base
from qlora_tui.export.gguf_file.content import gguf_content
from qlora_tui.export.gguf_file.writer import FileContent, StoredTypes, stored_types, write_gguf
from qlora_tui.export.llama_cpp.client import quantize, unavailable_because
from qlora_tui.export.proof import Proof, prove
from qlora_tui.export.reference import Reference, reference_or_reason, row_progress
from qlora_tui.export.unfinished_files import draft_folder, publish_files, refuse_existing, require_space
from qlora_tui.formatting import format_nats, format_number, short_model_name
from qlora_tui.runs.exports import COMPARED_TOKENS

_SPARE_BYTES = 64 << 20


class GgufFile(Struct, frozen=True, kw_only=True):
    """One written file."""

    path: str
    file_type: str
    bytes: int
    types: StoredTypes
    """Types of the matrices in the file."""
    proof: Proof | None = None
    """Comparison by llama.cpp; None if the file was not checked."""


class GgufExport(Struct, frozen=True, kw_only=True):
    """Result of an export."""

    files: tuple[GgufFile, ...]
    base: BaseChoice
    notes: tuple[str, ...] = ()
    unchecked_because: str = ""
    """Why llama.cpp did not check the files, and how to check them; empty if it checked them."""
    refused: tuple[str, ...] = ()
    """Requested types that could not be written, each with the reason."""

    @property
    def summary(self) -> str:
        """How the files were checked and what was merged, with a line for each sentence."""
        lines = [f"{file.proof.sentence}." for file in self.files if file.proof]
        lines += [
            _turn_ends_warning(file.file_type)
            for file in self.files
            if file.proof and file.proof.loses_turn_ends
        ]
        lines += [f"{file.file_type}: {file.types.sentence}." for file in self.files if file.types.sentence]
        if self.unchecked_because:
            lines.append(f"Not checked: {self.unchecked_because}.")
        return "\n".join([*lines, *filter(None, (self.base.sentence, *self.notes))])

    @property
    def verdict(self) -> str:
        """How close the first file is to the adapter, in a few words; empty if it was not compared."""
        return self.files[0].proof.verdict if self.files[0].proof else ""

    @property
    def command(self) -> str:
        """Command that runs the first file."""
        return f"llama-server -m {shlex.quote(self.files[0].path)}"


def export_gguf(
    source: ChatSource,
    adapter_name: str,
    out: Path,
    file_types: Sequence[str],
    *,
    within: float | None = None,
    compared_tokens: int = COMPARED_TOKENS,
    on_status: StatusFn = lambda words: None,
) -> GgufExport:
    """Write one GGUF file per type. A file whose answers differ too much from the adapter's is deleted.

    With ``auto``, only the file of the smallest type within the limit is kept.

    Args:
        source: The base and its adapters.
        adapter_name: The adapter to merge.
        out: A file ending in ``.gguf`` for one type, or a folder for any number of types.
        file_types: Types of :mod:`qlora_tui.catalog.gguf_file_types`, or ``auto`` alone.
        within: Maximum acceptable mean KL divergence, in nats. None means no limit or, for ``auto``,
            ``DEFAULT_WITHIN``.
        compared_tokens: Maximum number of positions to compare. Only tokens in the loss count.
        on_status: Called with the current activity.

    Raises:
        UserError: No file was written, for example because no type passed. If only some types pass, their
            files are kept without an error, and the result says which types were refused.
    """
    is_auto = tuple(file_types) == (AUTO,)
    kinds = LADDER if is_auto else tuple(dict.fromkeys(file_types))
    check_file_types(kinds)
    if is_auto and within is None:
        within = DEFAULT_WITHIN
    targets = final_paths(source, adapter_name, out, kinds, is_auto)
    weights = merged_weights(source.recipe, Path(source.adapters[adapter_name]), on_status)
    tokenizer = chat_tokenizer(source, weights.folder)
    content = gguf_content(source, tokenizer, weights)
    require_file_space(source, content, out, kinds, is_auto)
    with draft_folder(out) as draft:
        reference = reference_or_reason(source, adapter_name, on_status, compared_tokens)
        base = choose_base(source, adapter_name, reference, on_status)
        if base.chosen == "dequantized":
            weights = MergedWeights(weights.folder, weights.updates, base_requantizer(source, base))
            content = gguf_content(source, tokenizer, weights)
        unavailable = unavailable_because()
        unchecked = reference if isinstance(reference, str) else unavailable
        if within is not None and unchecked:
            raise UserError(
                "--within cannot be checked",
                what=f"llama.cpp cannot compare the files with the adapter. {unchecked}.",
                fix=f"Leave out --within and name a type, such as --quant {DEFAULT_TYPE}.",
            )
        job = _Export(content, draft, "" if unavailable else reference, within, on_status)
        files, refused = (job.smallest_within(kinds), ()) if is_auto else job.write_all(kinds)
        publish_files({Path(file.path): targets[file.file_type] for file in files})
        published = tuple(replace(file, path=str(targets[file.file_type])) for file in files)
    return GgufExport(
        files=published, base=base, notes=content.notes, unchecked_because=unchecked, refused=refused
    )


def needs_bf16(file_type: str, *, is_checked: bool) -> bool:
    """Return whether exporting a type requires a 16-bit GGUF file first.

    llama.cpp quantizes K types from this file. For other inexact types, the check needs it if ``is_checked``.
    """
    kind = find_file_type(file_type)
    return kind.needs_llama_cpp or (is_checked and not kind.is_nearly_exact)


def require_file_space(
    source: ChatSource,
    content: FileContent,
    out: Path,
    kinds: Sequence[str],
    is_auto: bool,
) -> None:
    """Raise UserError if the disk lacks space for the export.

    The export takes the size of all files or, with ``is_auto``, of the largest file, because only one is kept
    at a time. If a file is made from a 16-bit file that is not exported, the 16-bit file also takes space.
    """
    architecture = resolve_model(source.recipe.model.id).architecture
    sizes = [
        estimated_bytes(architecture, kind) if needs_llama_cpp(kind) else content.size(kind) for kind in kinds
    ]
    # ``auto`` keeps one file at a time.
    needed = max(sizes) if is_auto else sum(sizes)
    is_checked = not unavailable_because()
    if "BF16" not in kinds and any(needs_bf16(kind, is_checked=is_checked) for kind in kinds):
        needed += content.size("BF16")
    require_space(out.parent, needed + _SPARE_BYTES, "The export")


def check_file_types(kinds: Sequence[str]) -> None:
    """Raise UserError if a type is unknown, if a type needs llama.cpp and llama.cpp is unavailable, or if
    ``kinds`` contains ``auto``, which cannot be combined with other types.

    ``kinds``: the types to write; for ``auto`` alone, the types that it tries.
    """
    if AUTO in kinds:
        raise UserError(
            "auto cannot be combined with other types",
            what="auto chooses a type by itself, but other types were requested too.",
            fix="Name auto alone, or the types without it.",
            exit_code=EXIT_USAGE,
        )
    k_types = [kind for kind in kinds if needs_llama_cpp(kind)]
    if k_types and (reason := unavailable_because()):
        raise UserError(
            "llama.cpp is not available",
            what="The K types and auto need llama.cpp, which writes these files.",
            why=f"{reason}.",
            fix=f"Without llama.cpp, choose from {', '.join(types_without_llama_cpp())}.",
            exit_code=EXIT_USAGE,
        )


def final_paths(
    source: ChatSource, adapter_name: str, out: Path, kinds: Sequence[str], is_auto: bool
) -> dict[str, Path]:
    """Return the final path of each type. Raises UserError if a file exists there."""
    if out.suffix == ".gguf":
        if len(kinds) > 1 and not is_auto:
            raise UserError(
                "One file cannot hold several types",
                what=f"{out} names one file, but {len(kinds)} types were requested.",
                fix="Give a folder instead of a file: each exported file is named after its type.",
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


DEFAULT_WITHIN = 0.03
"""Maximum mean KL divergence, in nats, of the file that ``auto`` selects."""

StatusFn = Callable[[str], None]


class _RefusedError(UserError):
    """A written file failed its check."""


@dataclass
class _Export:
    """Writes files with the same content in different types to a folder."""

    content: FileContent
    folder: Path
    reference: Reference | str
    """The reference to compare the files with; a text if they are not checked."""
    within: float | None
    on_status: StatusFn
    _bf16: GgufFile | None = None

    def write_all(self, kinds: Sequence[str]) -> tuple[tuple[GgufFile, ...], tuple[str, ...]]:
        """Write files; return those that pass, and why others were refused.

        Raises UserError if none passes.
        """
        files, refused = [], []
        for kind in kinds:
            try:
                files.append(self.write(kind))
            except _RefusedError as error:
                if not files and kind == kinds[-1]:
                    raise
                refused.append(f"{error.what} {error.fix}")
        return tuple(files), tuple(refused)

    def write(self, file_type: str) -> GgufFile:
        """Write and check one file. Raises UserError."""
        file = self._write(file_type)
        try:
            self._require(file_type, file.proof)
        except _RefusedError:
            Path(file.path).unlink()
            raise
        return file

    def _require(self, file_type: str, proof: Proof | None) -> None:
        """Raise _RefusedError if a file fails its check."""
        if proof is not None and proof.problem:
            raise _refused(file_type, proof.problem)
        if proof is not None and self.within is not None and not proof.divergence <= self.within:
            larger = next_larger(file_type)
            raise _RefusedError(
                "The GGUF file does not meet --within",
                what=f"{file_type} has a KL divergence of {format_nats(proof.divergence)} from the adapter, "
                f"more than --within {format_number(self.within)} allows.",
                fix=f"Choose a larger type, such as {larger}, or raise --within."
                if larger
                else "Raise --within.",
            )

    def smallest_within(self, kinds: Sequence[str]) -> tuple[GgufFile]:
        """Write files, from the smallest type to the largest, until one passes its check, is within the limit
        and does not lose turn ends. Keep only this file. Raises UserError if there is none.
        """
        # export_gguf has set a bound, and has rejected a bound that cannot be checked.
        assert self.within is not None
        nearest: Proof | None = None
        for number, kind in enumerate(kinds, 1):
            self.on_status(f"Trying {kind} ({number} of at most {len(kinds)})")
            file = self._write(kind)
            nearest = file.proof
            assert nearest is not None
            if not nearest.problem and nearest.divergence <= self.within and not nearest.loses_turn_ends:
                return (file,)
            Path(file.path).unlink()
        assert nearest is not None
        raise UserError(
            "No file type is within the --within limit",
            what=f"The closest type: {nearest.sentence}. --within allows a KL divergence of at most "
            f"{format_number(self.within)}, and the model must stop after an answer almost as often as with "
            "the adapter.",
            fix="Raise --within, or export as F16.",
        )

    def _write(self, file_type: str) -> GgufFile:
        if file_type == "BF16":
            return self._write_bf16()
        if needs_bf16(file_type, is_checked=isinstance(self.reference, Reference)):
            # The 16-bit file shows mistakes that rounding to few bits would hide, and llama.cpp quantizes
            # from it.
            unquantized = self._write_bf16()
            if unquantized.proof and unquantized.proof.problem:
                raise _refused("BF16", unquantized.proof.problem)
        if not needs_llama_cpp(file_type):
            return self._write_unquantized(file_type)
        path = self.folder / f"{file_type}.gguf"
        self.on_status(f"Quantizing to {file_type}")
        quantize(unquantized.path, str(path), file_type)
        return self._checked(path, file_type)

    def _write_bf16(self) -> GgufFile:
        """Write and check the 16-bit file, once."""
        if self._bf16 is None:
            self._bf16 = self._write_unquantized("BF16")
        return self._bf16

    def _write_unquantized(self, file_type: str) -> GgufFile:
        path = self.folder / f"{file_type}.gguf"
        on_progress = every_tenth(self.on_status, f"Writing {file_type}")
        write_gguf(self.content, path, file_type, on_progress)
        return self._checked(path, file_type)

    def _checked(self, path: Path, file_type: str) -> GgufFile:
        proof = None
        if isinstance(self.reference, Reference):
            words = f"Running the {file_type} file in llama.cpp to get its answers"
            self.on_status(words)
            differences = self.content.vocabulary.differences
            proof = prove(self.reference, path, file_type, differences, row_progress(self.on_status, words))
        types = stored_types(path, file_type)
        size = path.stat().st_size
        return GgufFile(path=str(path), file_type=file_type, bytes=size, types=types, proof=proof)


def _turn_ends_warning(file_type: str) -> str:
    larger = next_larger(file_type)
    advice = f" Try a larger type: {larger}." if larger else ""
    return (
        f"With {file_type}, the model fails to stop after an answer more often than with the adapter, so "
        f"some answers will run on.{advice}"
    )


def _refused(file_type: str, problem: str) -> _RefusedError:
    return _RefusedError(
        "The GGUF file does not answer like the adapter",
        what=f"{file_type}: {problem}.",
        fix="Use the adapter or `qlora-tui export merge`, and report the problem."
        if find_file_type(file_type).is_nearly_exact
        else f"Choose a larger type, such as {DEFAULT_TYPE}.",
    )
