"""Writes a GGUF file one tensor at a time, each encoded a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_tui.catalog.gguf import FileType
from qlora_tui.export.gguf_file.hyperparameters import Hyperparameters
from qlora_tui.export.gguf_file.tensor_types import encode, encoded_bytes, tensor_type
from qlora_tui.export.gguf_file.vocabulary import Vocabulary

_ALIGNMENT = 32
"""Tensors begin at multiples of so many bytes (gguf, GGUF_DEFAULT_ALIGNMENT)."""
_BLOCK_WEIGHTS = 1 << 24
"""Number of weights that are encoded at once."""


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns its values, of ``shape``."""


@dataclass(frozen=True)
class FileContent:
    """Everything that a GGUF file holds."""

    architecture: str
    hyperparameters: Hyperparameters
    vocabulary: Vocabulary
    general: dict[str, str | int]
    """``general.*`` keys, without the prefix."""
    tensors: tuple[SourceTensor, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences about what llama.cpp does differently."""
        differences = (each.note for each in self.vocabulary.differences)
        return (*self.hyperparameters.notes, *self.vocabulary.prompt_notes, *differences)

    def size(self, file_type: FileType) -> int:
        """Return the bytes of the tensors in a file of a type."""
        return sum(encoded_bytes(t.shape, tensor_type(t.name, t.shape, file_type)) for t in self.tensors)


def write_gguf(
    content: FileContent,
    path: Path,
    file_type: FileType,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``path``. ``on_progress`` is called with bytes of tensors written, and in all; it may raise.

    Raises OSError and UserError; what was written is then left for the caller to delete.
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


def _header(content: FileContent, types: Sequence[Any], path: Path, file_type: FileType) -> bytes:
    """Return everything before the tensors; writes it to ``path`` and deletes that."""
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
        name = f"{content.architecture}.{key}"
        match value:
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
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

    # The package takes the shape of a quantized tensor in bytes.
    shape = quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), encoded_bytes(tensor.shape, kind), kind)


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """Yield a matrix in blocks of rows."""
    rows = len(values) if values.ndim < 2 else max(1, _BLOCK_WEIGHTS // values.shape[-1])
    for start in range(0, len(values), rows):
        yield values[start : start + rows]
