"""``export lora``: a run's adapter as a GGUF file that llama.cpp loads beside the base (``--lora``).

llama.cpp scales each update B·A by ``adapter.lora.alpha`` / rank, one alpha for the whole file, or by 1 where
alpha is 0 (src/llama-adapter.h). So alpha is written as 0 and each module's own scale is multiplied into B:
rsLoRA and different ranks or alphas per module stay exact.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from msgspec import Struct, structs
from torch import Tensor

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.adapter_deltas import (
    AdapterDeltas,
    EmbeddingRowDelta,
    LoraDelta,
    WholeMatrix,
    read_deltas,
)
from qlora_tui.chat.base_weights import assign_deltas
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.expert_deltas import ExpertDelta, FusedExpertDelta
from qlora_tui.chat.session import chat_tokenizer, every_tenth, model_folder
from qlora_tui.errors import UserError
from qlora_tui.export.answer_files import row_progress
from qlora_tui.export.base_choice import unquantized
from qlora_tui.export.export_key import export_key
from qlora_tui.export.gguf_file.content import general_keys, gguf_content, text_config
from qlora_tui.export.gguf_file.families import TensorNames
from qlora_tui.export.gguf_file.writer import SourceTensor, write_gguf, write_lora
from qlora_tui.export.journal import Journal
from qlora_tui.export.llama_cpp.llama_process import unavailable_because
from qlora_tui.export.merged_weights import MergedWeights, require_mergeable
from qlora_tui.export.proof import Proof, prove
from qlora_tui.export.reference import (
    Reference,
    reason_of,
    reference_bytes,
    reference_or_reason,
)
from qlora_tui.export.requantize import requantizer
from qlora_tui.export.unfinished_files import draft_folder, publish_files, refuse_existing, require_space
from qlora_tui.formatting import capitalize, short_model_name
from qlora_tui.runs.exports import COMPARED_TOKENS

StatusFn = Callable[[str], None]


class LoraExport(Struct, frozen=True, kw_only=True):
    """A written adapter."""

    path: str
    bytes: int
    modules: int
    """Number of weight matrices that it changes."""
    base: str
    """Name of the base."""
    proof: Proof | None = None
    """On the base weights of the training: dequantized, if those were quantized to 4 bits."""
    on_16_bits: Proof | None = None
    """The adapter on the original 16-bit weights, compared with a training on 4-bit ones."""
    unchecked_because: str = ""

    @property
    def summary(self) -> str:
        """Say how the file was checked, and on which base, a sentence a line."""
        proofs = filter(None, (self.proof, self.on_16_bits))
        lines = [f"{proof.sentence}." for proof in proofs]
        if self.proof is None:
            lines.append(f"Not checked: {self.unchecked_because}.")
        if self.on_16_bits:
            lines.append("`qlora-tui export gguf` merges the adapter into the weights of its training.")
        lines.append(
            f"BASE.gguf in the command is a GGUF file of {self.base}, best in BF16 or F16, such as one "
            "from the Hub."
        )
        return "\n".join(lines)

    @property
    def command(self) -> str:
        """Return the command that runs it with a base."""
        return f"llama-server -m BASE.gguf --lora {shlex.quote(self.path)}"


def export_lora(
    source: ChatSource,
    adapter_name: str,
    out: Path,
    on_status: StatusFn = lambda words: None,
    *,
    compared_tokens: int = COMPARED_TOKENS,
) -> LoraExport:
    """Write an adapter as a GGUF file, comparing answers at no more than ``compared_tokens``.

    Raises UserError and leaves nothing under the name ``out``.
    """
    refuse_existing(out)
    base = model_folder(source.recipe, on_status)
    require_mergeable(base)
    files = [base / name for name in weight_files(base)]
    adapter = Path(source.adapters[adapter_name])
    deltas = read_deltas(adapter)
    _refuse_whole_matrices(deltas)
    placed = assign_deltas(deltas, files, adapter)
    updates: AdapterDeltas = {name: update for group in placed.values() for name, update in group.items()}
    names = TensorNames(text_config(base))
    _refuse_inexpressible(updates, names)
    weights = MergedWeights(base, {file: {} for file in files})
    stored = {tensor.name: tensor.read for tensor in weights}
    tensors = tuple(_tensors(updates, names, stored))
    with draft_folder(out, export_key(source, adapter_name, "lora", compared_tokens)) as draft:
        path = draft / "lora.gguf"
        write_lora(names.family.architecture, general_keys(source, base), tensors, path)
        proof, on_16_bits, unchecked = None, None, unavailable_because()
        if not unchecked:
            proof, on_16_bits, unchecked = _proofs(
                source, adapter_name, weights, path, on_status, compared_tokens
            )
        if proof and proof.problem:
            raise UserError(
                "The exported adapter does not answer as the adapter does",
                what=f"{capitalize(proof.problem)}.",
                fix="The file was not kept. Use `qlora-tui export gguf`, and report the model.",
            )
        size = path.stat().st_size
        publish_files({path: out})
    return LoraExport(
        path=str(out),
        bytes=size,
        modules=len(tensors) // 2,
        base=_base_name(source),
        proof=proof,
        on_16_bits=on_16_bits,
        unchecked_because=unchecked,
    )


def _base_name(source: ChatSource) -> str:
    """Return the base's id on the Hub, or its name."""
    model = resolve_model(source.recipe.model.id)
    return model.id if model.source == "hub cache" else short_model_name(model.id)


def _proofs(
    source: ChatSource,
    adapter_name: str,
    weights: MergedWeights,
    path: Path,
    on_status: StatusFn,
    compared_tokens: int,
) -> tuple[Proof | None, Proof | None, str]:
    """Return the proof on the base of the training, that on the 16-bit base, and why there is none.

    After a training on 4-bit weights both compare with it, so that the 16-bit model, which may be too large
    for the GPU, is not loaded. Raises UserError.
    """
    settings = source.recipe.quantization
    requantize = requantizer(resolve_model(source.recipe.model.id).architecture, settings)
    trained = source if requantize else unquantized(source)
    # Before the reference, which takes minutes.
    content = gguf_content(source, chat_tokenizer(source, weights.folder), weights)
    needed = content.size("BF16") + reference_bytes(source, compared_tokens)
    try:
        require_space(path.parent, needed, "The base model for the comparison")
    except UserError as error:
        return None, None, reason_of(error)
    with ExitStack() as stack:
        reference = reference_or_reason(
            stack, trained, adapter_name, Journal(path.parent), on_status, compared_tokens
        )
        if isinstance(reference, str):
            return None, None, reference
        original = "original 16-bit weights"
        if requantize is None:
            return _prove(reference, source, weights, original, path, on_status), None, ""
        name = f"{settings.method.upper()} weights of its training"
        proof = _prove(reference, source, replace(weights, requantize=requantize), name, path, on_status)
        if proof.problem:
            return proof, None, ""
        on_16_bits = _prove(reference, source, weights, original, path, on_status)
        # It is not the file's fault that the base is another.
        return proof, structs.replace(on_16_bits, problem=""), ""


def _prove(
    reference: Reference,
    source: ChatSource,
    weights: MergedWeights,
    name: str,
    path: Path,
    on_status: StatusFn,
) -> Proof:
    """Compare base and adapter as two files with the trained model. Raises UserError.

    ``name`` says which weights those of the base are.
    """
    content = gguf_content(source, chat_tokenizer(source, weights.folder), weights)
    model = path.with_name("base.gguf")
    write_gguf(content, model, "BF16", every_tenth(on_status, f"Writing the {name} for the comparison"))
    words = f"Asking llama.cpp what the adapter answers on the {name}"
    on_status(words)
    on_progress = row_progress(on_status, words)
    differences = content.vocabulary.differences
    proof = prove(reference, model, "BF16", differences, lora=path, on_progress=on_progress)
    model.unlink()
    return structs.replace(proof, name=f"On the {name}, the LoRA")


def _refuse_whole_matrices(deltas: AdapterDeltas) -> None:
    """Raise UserError for an adapter that trained embedding and head in whole."""
    if any(isinstance(update, WholeMatrix) for update in deltas.values()):
        raise UserError(
            "A trained embedding cannot be exported as LoRA",
            what="The adapter holds whole matrices (lora.train_embeddings), and llama.cpp's LoRA files only "
            "updates of low rank.",
            fix="Export the merged model instead: `qlora-tui export gguf`.",
        )


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
    if any(isinstance(update, ExpertDelta | FusedExpertDelta) for update in updates.values()):
        raise UserError(
            "An adapter on experts cannot be exported as LoRA",
            what="The files of the base hold all experts of a layer in one tensor.",
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
        elif isinstance(update, EmbeddingRowDelta):
            is_embedding = target.startswith("token_embd")
            down, up = _rows_as_lora(update, weights[name](), is_embedding=is_embedding)
        else:
            raise TypeError(f"{name} is an update of experts or in whole")
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
