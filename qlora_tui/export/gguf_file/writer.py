"""Writes a GGUF file one tensor at a time, encoding blocks of rows; reads the types of a written file.

Norms, biases, rotary factors and routers stay float32, as llama.cpp expects. In a file of a 4- or 5-bit type,
the embedding and the head are Q8_0, because low precision harms these weights most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.gguf_file_types import K_BLOCK, find_file_type
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.parameters import Hyperparameters
from qlora_tui.export.gguf_file.vocabulary import Vocabulary
from qlora_tui.gguf_format.tensors import SourceTensor

_ALWAYS_WIDE = (
    ".ffn_gate_inp",
    ".ssm_conv1d.",
    ".shortconv.conv.",
    "_norm.",
)
"""Parts of names of matrices that llama.cpp reads only in float32."""
_WIDE_AT_FEW_BITS = ("token_embd.weight", "output.weight")


def tensor_type(name: str, shape: tuple[int, ...], file_type: str) -> Any:
    """Return the ``GGMLQuantizationType`` of a tensor. ``file_type``: type of the file, which must be one
    that the ``gguf`` package writes.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    is_wide = (
        name.startswith("rope_") or not name.endswith(".weight") or any(part in name for part in _ALWAYS_WIDE)
    )
    if len(shape) < 2 or is_wide:
        return GGMLQuantizationType.F32
    if name in _WIDE_AT_FEW_BITS and not find_file_type(file_type).is_nearly_exact:
        file_type = "Q8_0"
    kind = GGMLQuantizationType[file_type]
    block, _ = GGML_QUANT_SIZES[kind]
    # A row whose length is not a multiple of the block size cannot be quantized.
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def encoded_bytes(shape: tuple[int, ...], kind: Any) -> int:
    """Return the size of a tensor in the file, in bytes."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def encode(values: Tensor, kind: Any) -> bytes:
    """Encode a tensor or a block of its rows. Raises UserError if ``kind`` is F16 and a weight is too large
    for it or not a number.
    """
    from gguf import GGMLQuantizationType, quantize

    if kind == GGMLQuantizationType.BF16:
        return bytes(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    if kind == GGMLQuantizationType.F16:
        halves = values.to(torch.float16)
        if not bool(torch.isfinite(halves).all()):
            raise UserError(
                "A weight is too large for float16",
                what="F16 stores values up to 65,504, and a weight is larger, or is not a number.",
                fix="Export as BF16 or Q8_0.",
            )
        return bytes(halves.contiguous().view(torch.uint8).numpy().data)
    wide = values.float().contiguous().numpy()
    return bytes(wide.data if kind == GGMLQuantizationType.F32 else quantize(wide, kind).data)


_ALIGNMENT = 32
"""Alignment of each tensor's offset, in bytes (gguf, GGUF_DEFAULT_ALIGNMENT)."""
_BLOCK_WEIGHTS = 1 << 24
"""Number of weights that are encoded at once."""


@dataclass(frozen=True)
class FileContent:
    """The complete content of a GGUF file."""

    architecture: str
    hyperparameters: Hyperparameters
    vocabulary: Vocabulary
    general: dict[str, str | int]
    """``general.*`` keys, without the prefix."""
    tensors: tuple[SourceTensor, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what llama.cpp does differently."""
        differences = (each.note for each in self.vocabulary.differences)
        return (*self.hyperparameters.notes, *self.vocabulary.prompt_notes, *differences)

    def size(self, file_type: str) -> int:
        """Return the size of the tensors in a file of this type, in bytes."""
        return sum(encoded_bytes(t.shape, tensor_type(t.name, t.shape, file_type)) for t in self.tensors)


def write_gguf(
    content: FileContent,
    path: Path,
    file_type: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``path``. ``on_progress`` is called with written and total bytes of tensors, and may raise.

    Raises OSError and UserError. In this case, the caller must delete the incomplete file.
    """
    types = [tensor_type(tensor.name, tensor.shape, file_type) for tensor in content.tensors]
    sizes = [encoded_bytes(t.shape, kind) for t, kind in zip(content.tensors, types, strict=True)]
    done, total = 0, sum(sizes)
    with path.open("wb") as file:
        file.write(_header(content, types, path.with_name(f"{path.name}.header"), file_type))
        for tensor, kind, size in zip(content.tensors, types, sizes, strict=True):
            end = done + size
            for block in _blocks(tensor.read()):
                done += file.write(encode(block, kind))
                on_progress(done, total)
            assert done == end
            file.write(bytes(_padded(size) - size))


def _header(content: FileContent, types: Sequence[Any], path: Path, file_type: str) -> bytes:
    """Return all bytes before the tensors. Uses ``path`` as a temporary file, which is deleted."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, content.architecture)
    try:
        writer.add_file_type(LlamaFileType[f"MOSTLY_{file_type}"])
        writer.add_quantization_version(2)
        _add_general(writer, content.general)
        _add_hyperparameters(writer, content)
        _add_vocabulary(writer, content.vocabulary)
        for tensor, kind in zip(content.tensors, types, strict=True):
            _add_tensor_info(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    header = path.read_bytes()
    path.unlink()
    return header + bytes(_padded(len(header)) - len(header))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _add_general(writer: Any, general: Mapping[str, str | int]) -> None:
    for key, value in general.items():
        if isinstance(value, int):
            writer.add_uint32(f"general.{key}", value)
        else:
            writer.add_string(f"general.{key}", value)


def _add_hyperparameters(writer: Any, content: FileContent) -> None:
    for key, value in content.hyperparameters.values.items():
        name = key if key.startswith("xielu.") else f"{content.architecture}.{key}"
        match value:
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case _:
                writer.add_float32(name, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    templates = {"default": vocabulary.template, "tool_use": vocabulary.tool_template}
    writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items() if text])


def _add_tensor_info(writer: Any, tensor: SourceTensor, kind: Any) -> None:
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape

    # The package expects the shape of a quantized tensor in bytes.
    shape = quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), encoded_bytes(tensor.shape, kind), kind)


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """Yield a matrix in blocks of rows."""
    rows = len(values) if values.ndim < 2 else max(1, _BLOCK_WEIGHTS // values.shape[-1])
    for start in range(0, len(values), rows):
        yield values[start : start + rows]


class StoredTypes(Struct, frozen=True):
    """Types of the matrices in a file."""

    counts: dict[str, int]
    """Number of matrices by type, the most frequent first."""
    replaced: tuple[str, ...] = ()
    """Larger types that are used for matrices whose row length is not a multiple of the block size."""
    replaced_count: int = 0
    row_lengths: tuple[int, ...] = ()
    """Row lengths that are not multiples of the block size."""
    block: int = K_BLOCK
    """Number of weights in a block of the file's type."""

    @property
    def sentence(self) -> str:
        """Why the file is larger than its type suggests; empty if it is not."""
        if not self.replaced:
            return ""
        lengths = " and ".join(f"{length:,}" for length in self.row_lengths)
        count = f"{self.replaced_count} of {sum(self.counts.values())} matrices"
        return (
            f"{count} are {' and '.join(self.replaced)}, "
            f"which makes the file larger: row lengths {lengths} are not multiples of the block size "
            f"{self.block}"
        )


def stored_types(path: Path, file_type: str) -> StoredTypes:
    """Return the types of the matrices in a written file. Raises UserError if the file is not a GGUF file, or
    if ``file_type`` is unknown.
    """
    from gguf import GGMLQuantizationType

    header = read_gguf(path)
    matrices = {
        name: GGMLQuantizationType(kind).name
        for name, kind in header.tensor_types.items()
        if len(header.tensors[name]) > 1
    }
    block = find_file_type(file_type).block
    # Matrices in float32 are stored so in a file of any type.
    replaced = [name for name, kind in matrices.items() if kind != "F32" and header.tensors[name][0] % block]
    return StoredTypes(
        counts=dict(Counter(matrices.values()).most_common()),
        replaced=tuple(kind for kind, _ in Counter(matrices[name] for name in replaced).most_common()),
        replaced_count=len(replaced),
        row_lengths=tuple(sorted({header.tensors[name][0] for name in replaced})),
        block=block,
    )
