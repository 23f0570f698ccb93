"""The parts of a GGUF file's header that the model list and the estimate need.

This parser exists because the ``gguf`` package imports numpy, which the app must start without. Format:
github.com/ggml-org/ggml, docs/gguf.md. Arrays are skipped, not read: only their lengths are kept.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.catalog import gguf_support
from qlora_tui.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 8

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    32: "BF16",
}  # fmt: skip
"""Common values of ``general.file_type``, numbered as in llama.cpp."""

CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Keys of an architecture that define the model's shape, with their names in config.json."""

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "starcoder2": "starcoder2",
}
"""GGUF architectures that transformers can convert to a dense model and ``families/`` has a table for."""


@dataclass(frozen=True)
class GgufHeader:
    """The parsed header of a GGUF file."""

    values: dict[str, Any]
    """Metadata by key: numbers, booleans and strings."""
    lengths: dict[str, int]
    """Lengths of metadata arrays, such as ``tokenizer.ggml.tokens``."""
    tensors: dict[str, tuple[int, ...]]
    """Dimensions by tensor name, the fastest-moving first: (in, out) for a linear weight."""
    tensor_types: dict[str, int] = field(default_factory=dict)
    """Type of each tensor, numbered as ggml's ``ggml_type``."""

    @property
    def architecture(self) -> str | None:
        name = self.values.get("general.architecture")
        return name if isinstance(name, str) else None

    @property
    def quantization(self) -> str | None:
        """Return the quantization, such as ``Q4_1``; None where the file does not say."""
        return FILE_TYPES.get(self.values.get("general.file_type", -1))

    @property
    def vocab_size(self) -> int | None:
        table = self.tensors.get("token_embd.weight", ())
        return table[1] if len(table) == 2 else self.lengths.get("tokenizer.ggml.tokens")


class _CorruptFileError(Exception):
    """The bytes do not follow the format."""


class _Cursor:
    """Reads forward through the file's bytes; never past their end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.offset = 0

    def skip(self, count: int) -> int:
        """Advance by ``count`` bytes; return the offset before them."""
        start = self.offset
        if count < 0 or start + count > len(self.data):
            raise _CorruptFileError
        self.offset = start + count
        return start

    def number(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.skip(length)
        try:
            return self.data[start : self.offset].decode()
        except UnicodeDecodeError:
            raise _CorruptFileError from None

    def skip_array(self) -> int:
        """Skip an array of scalars or strings; return its length."""
        kind, length = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            self.skip(length * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            self._skip_strings(length)
        else:
            raise _CorruptFileError
        return int(length)

    def _skip_strings(self, count: int) -> None:
        data, at, end = self.data, self.offset, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise _CorruptFileError
            at += 8 + unpack(data, at)[0]
        if at > end:
            raise _CorruptFileError
        self.offset = at


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of ``path``. Raises UserError when it cannot be read or is not GGUF."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data))
    except OSError as error:
        raise _gguf_problem(path, f"it cannot be read ({error.strerror})") from None
    except ValueError:
        raise _gguf_problem(path, "it is empty") from None
    except _CorruptFileError:
        raise _gguf_problem(path, "it is not a complete GGUF file of version 2 or 3") from None


def _gguf_problem(path: Path, why: str, *, is_complete: bool = False) -> UserError:
    fix = "Choose the model in the Hugging Face format"
    return UserError(
        "The GGUF file cannot be used",
        what=f"{path}: {why}.",
        fix=f"{fix}." if is_complete else f"Download the file again, or {fix[0].lower()}{fix[1:]}.",
    )


def _read(cursor: _Cursor) -> GgufHeader:
    start = cursor.skip(4)
    if cursor.data[start : cursor.offset] != MAGIC or cursor.number("<I") not in VERSIONS:
        raise _CorruptFileError
    tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
    values: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(value_count):
        key, kind = cursor.text(), cursor.number("<I")
        if kind == ARRAY:
            lengths[key] = cursor.skip_array()
        elif kind == STRING:
            values[key] = cursor.text()
        elif kind in SCALARS:
            values[key] = cursor.number(SCALARS[kind])
        else:
            raise _CorruptFileError
    tensors = [_tensor(cursor) for _ in range(tensor_count)]
    shapes = {name: shape for name, shape, _ in tensors}
    return GgufHeader(values, lengths, shapes, {name: kind for name, _, kind in tensors})


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int]:
    name, dimensions = cursor.text(), cursor.number("<I")
    if dimensions > MAX_DIMENSIONS:
        raise _CorruptFileError
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    kind = cursor.number("<I")
    cursor.skip(8)  # offset
    return name, shape, kind


def to_hf_config(header: GgufHeader, path: Path) -> dict[str, Any]:
    """Convert the header to the form of ``config.json``, for ``parse_architecture``.

    Raises UserError for an architecture that cannot be converted to a dense model, and for a file with
    something that the converted model would not have.
    """
    architecture = header.architecture
    if architecture not in MODEL_TYPES or header.values.get(f"{architecture}.expert_count"):
        mixture = " (a mixture of experts)" if architecture in MODEL_TYPES else ""
        raise _gguf_problem(
            path, f"its architecture {architecture!r}{mixture} cannot be trained from GGUF", is_complete=True
        )
    config: dict[str, Any] = {"model_type": MODEL_TYPES[architecture]}
    for key, name in CONFIG_KEYS.items():
        if f"{architecture}.{key}" in header.lengths:
            raise _gguf_problem(
                path, f"{architecture}.{key} differs between layers, which is not supported", is_complete=True
            )
        if (value := header.values.get(f"{architecture}.{key}")) is not None:
            config[name] = value
    if lost := gguf_support.not_understood(header, architecture):
        raise _gguf_problem(
            path, f"{lost} would be lost, and another model be trained than the file holds", is_complete=True
        )
    if architecture == "llama" and "head_dim" not in config:
        config["head_dim"] = header.values.get("llama.rope.dimension_count")
    config.setdefault("vocab_size", header.vocab_size)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["dtype"] = header.quantization
    return config
