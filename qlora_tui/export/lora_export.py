"""``export lora``: a run's adapter as a GGUF file that llama.cpp loads beside the base (``--lora``).

llama.cpp scales each update B·A by ``adapter.lora.alpha`` / rank, one alpha for the whole file, or by 1 where
alpha is 0 (src/llama-adapter.h). So alpha is written as 0 and each module's own scale is multiplied into B:
rsLoRA and different ranks or alphas per module stay exact.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from msgspec import Struct
from msgspec.structs import replace
from torch import Tensor

from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.adapter_deltas import AdapterDeltas, EmbeddingRowDelta, LoraDelta, read_deltas
from qlora_tui.chat.base_weights import assign_deltas
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import chat_tokenizer, every_tenth, model_folder
from qlora_tui.errors import UserError
from qlora_tui.export.base_choice import unquantized
from qlora_tui.export.gguf_file.content import general_keys, gguf_content, text_config
from qlora_tui.export.gguf_file.families import TensorNames
from qlora_tui.export.gguf_file.writer import SourceTensor, write_gguf, write_lora
from qlora_tui.export.llama_cpp.bindings import is_installed
from qlora_tui.export.llama_cpp.llama_process import INSTALL_HINT
from qlora_tui.export.merged_weights import MergedWeights
from qlora_tui.export.proof import Proof, prove
from qlora_tui.export.reference import Reference, reference_or_reason
from qlora_tui.export.unfinished_files import draft_folder, publish_file, refuse_existing, require_space

StatusFn = Callable[[str], None]


class LoraExport(Struct, frozen=True, kw_only=True):
    """A written adapter."""

    path: str
    bytes: int
    modules: int
    """Number of weight matrices that it changes."""
    proof: Proof | None = None
    unchecked_because: str = ""
    trained_on: str = ""
    """How the base was quantized in training, such as ``NF4``; empty if it was not."""

    @property
    def summary(self) -> str:
        """Say how the file was checked, and on which base, a sentence a line."""
        lines = [f"{self.proof.sentence}." if self.proof else f"Not checked: {self.unchecked_because}."]
        if self.trained_on:
            lines.append(
                f"It was trained on {self.trained_on} weights: on others, also the original 16-bit ones, its "
                "answers differ from those of the training. How much was not measured."
            )
        return "\n".join(lines)

    @property
    def command(self) -> str:
        """Return the command that runs it with a base."""
        return f"llama-server -m BASE.gguf --lora {shlex.quote(self.path)}"


def export_lora(
    source: ChatSource, adapter_name: str, out: Path, on_status: StatusFn = lambda words: None
) -> LoraExport:
    """Write an adapter as a GGUF file. Raises UserError and leaves nothing under the name ``out``."""
    refuse_existing(out)
    base = model_folder(source.recipe, on_status)
    files = [base / name for name in weight_files(base)]
    adapter = Path(source.adapters[adapter_name])
    deltas = read_deltas(adapter)
    placed = assign_deltas(deltas, files, adapter)
    updates: AdapterDeltas = {name: update for group in placed.values() for name, update in group.items()}
    names = TensorNames(text_config(base))
    _refuse_inexpressible(updates, names)
    stored = {tensor.name: tensor.read for tensor in MergedWeights(base, {file: {} for file in files})}
    tensors = tuple(_tensors(updates, names, stored))
    with draft_folder(out) as draft:
        path = draft / "lora.gguf"
        write_lora(names.family.architecture, general_keys(source, base), tensors, path)
        proof, unchecked = None, f"llama.cpp is not installed. {INSTALL_HINT}".rstrip(".")
        if is_installed():
            with ExitStack() as stack:
                reference = reference_or_reason(stack, unquantized(source), adapter_name, draft, on_status)
                unchecked = reference if isinstance(reference, str) else ""
                if not isinstance(reference, str):
                    proof = _prove(reference, source, base, files, path, on_status)
        if proof and proof.problem:
            raise UserError(
                "The exported adapter does not answer as the adapter does",
                what=f"{proof.problem[0].upper()}{proof.problem[1:]}.",
                fix="The file was not kept. Use `qlora-tui export gguf`, and report the model.",
            )
        size = path.stat().st_size
        publish_file(path, out)
    method = source.recipe.quantization.method
    return LoraExport(
        path=str(out),
        bytes=size,
        modules=len(tensors) // 2,
        proof=proof,
        unchecked_because=unchecked,
        trained_on="" if method == "none" else method.upper(),
    )


def _prove(
    reference: Reference, source: ChatSource, base: Path, files: list[Path], path: Path, on_status: StatusFn
) -> Proof:
    """Compare base and adapter as two files with base and adapter in 16 bits. Raises UserError."""
    weights = MergedWeights(base, {file: {} for file in files})
    content = gguf_content(source, chat_tokenizer(source, base), weights)
    require_space(path.parent, content.size("BF16"), "The base model for the comparison")
    model = path.with_name("base.gguf")
    on_status("Writing the base model for the comparison")
    write_gguf(content, model, "BF16")
    words = "Asking llama.cpp what base and adapter answer"
    on_status(words)
    on_progress = every_tenth(on_status, words)
    known = content.vocabulary.differences
    proof = prove(reference, model, "BF16", known, lora=path, on_progress=on_progress)
    return replace(proof, name="On the original 16-bit base, the LoRA")


def _refuse_inexpressible(updates: AdapterDeltas, names: TensorNames) -> None:
    """Raise UserError for updates that a LoRA in a GGUF file cannot express."""
    fix = "Export the merged model instead: `qlora-tui export gguf`."
    if any(isinstance(update, LoraDelta) and update.magnitude is not None for update in updates.values()):
        raise UserError(
            "A DoRA adapter cannot be exported as LoRA",
            what="DoRA also rescales the rows of each weight, which llama.cpp's LoRA files cannot express.",
            fix=fix,
        )
    tied = bool(names.config.tie_word_embeddings)
    if tied and any(isinstance(update, EmbeddingRowDelta) for update in updates.values()):
        raise UserError(
            "Trained token rows cannot be exported as LoRA",
            what="The model has one matrix for embedding and head, and llama.cpp ends at a LoRA on it.",
            fix=fix,
        )
    if left_out := [name for name in updates if names.name_of(name) is None]:
        raise UserError(
            "Part of the adapter cannot be exported as LoRA",
            what=f"It changes {len(left_out):,} weights that GGUF files do not hold, such as {left_out[0]}.",
            fix="Export the merged model instead: `qlora-tui export merge`.",
        )


def _tensors(
    updates: AdapterDeltas, names: TensorNames, weights: Mapping[str, Callable[[], Tensor]]
) -> Iterator[SourceTensor]:
    """Yield A and B of each update, float32, with B's rows in llama.cpp's order.

    ``weights`` reads a base weight by its name.
    """
    for name, update in updates.items():
        target = names.name_of(name)
        assert target is not None
        if isinstance(update, LoraDelta):
            change = names.transform_for(name)
            up = update.up.float() * update.scale
            down, up = update.down.float(), up if change is None else change(up)
        else:
            is_embedding = target.startswith("token_embd")
            down, up = _rows_as_lora(update, weights[name](), is_embedding=is_embedding)
        for side, values in (("a", down), ("b", up)):
            yield SourceTensor(f"{target}.lora_{side}", tuple(values.shape), values.clone)


def _rows_as_lora(update: EmbeddingRowDelta, weight: Tensor, *, is_embedding: bool) -> tuple[Tensor, Tensor]:
    """Return A and B whose product changes only the trained rows; their rank is the number of rows.

    With rows r of a head (vocabulary, width): B, (vocabulary, rank), is 1 at (r[i], i), and A, (rank, width),
    the differences. llama.cpp looks the rows of an embedding's A up by token id, so there A is B above, and B
    is the differences transposed.
    """
    ids = list(update.ids)
    differences = update.rows.float() - weight[ids].float()
    selection = torch.zeros(weight.shape[0], len(ids))
    selection[ids, range(len(ids))] = 1.0
    return (selection, differences.T) if is_embedding else (differences, selection)
