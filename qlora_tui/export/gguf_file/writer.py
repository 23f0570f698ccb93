"""Writes a GGUF file one tensor at a time, each encoded a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_tui.catalog.gguf_file_types import FileType
from qlora_tui.export.gguf_file.hyperparameters import Hyperparameters
from qlora_tui.export.gguf_file.tensor_types import encode, encoded_bytes, tensor_type
from qlora_tui.export.gguf_file.vocabulary import Vocabulary

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
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, content.architecture)
    try:
        writer.add_file_type(LlamaFileType[f"MOSTLY_{file_type}"])
        writer.add_quantization_version(2)
        _add_general(writer, content.general)
        _add_hyperparameters(writer, content)
        _add_vocabulary(writer, content.vocabulary)
        types = [tensor_type(tensor.name, tensor.shape, file_type) for tensor in content.tensors]
        for tensor, kind in zip(content.tensors, types, strict=True):
            _add_tensor_info(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        total, done = content.size(file_type), 0
        for tensor, kind in zip(content.tensors, types, strict=True):
            size = 0
            for block in _blocks(tensor.read()):
                size += file.write(encode(block, kind))
                on_progress(done + size, total)
            assert size == encoded_bytes(tensor.shape, kind)
            writer.write_padding(file, size)
            done += size
    finally:
        writer.close()


def write_lora(
    architecture: str, general: Mapping[str, str | int], tensors: Iterable[SourceTensor], path: Path
) -> None:
    """Write the float32 matrices of an adapter; each module's scale is already part of its B."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        writer.add_type("adapter")
        _add_general(writer, general)
        writer.add_string("adapter.type", "lora")
        # 0 makes llama.cpp scale by 1.
        writer.add_float32("adapter.lora.alpha", 0.0)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.read().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


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
    writer.add_chat_template(vocabulary.template)


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
