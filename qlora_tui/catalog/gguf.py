"""GGUF files: reading their header, and the file types of exports.

This parser exists because the ``gguf`` package imports numpy, which the app must start without. Format:
github.com/ggml-org/ggml, docs/gguf.md. Unless the vocabulary is requested, only short arrays of
numbers are read, such as a value for each layer. :mod:`qlora_tui.catalog.gguf_config` interprets the
metadata.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qlora_tui.catalog.architecture_types import Architecture
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
MAX_TEXT_BYTES = 4 << 20
"""Size of the longest text that is read, in bytes; of longer texts only the length is known.

The longest chat templates have a hundred thousand characters.
"""
MAX_TEXTS_BYTES = 16 << 20
"""Maximum total size of the texts in one file, in bytes. Real files have far less. A file with more is
refused.
"""
MAX_ARRAY = 4096
"""Length of the longest array of numbers that is read; arrays about a model's layers have a few hundred."""
MAX_TOKENS = 1 << 22
"""Length of the longest vocabulary array that is read; the largest have 262,144 tokens and 580,000 merges."""
_F32 = 0
"""``GGML_TYPE_F32``."""
_ROPE_FACTORS = "rope_"
"""Prefix of the names of vectors that divide frequencies of the rotary embedding (``rope_freqs.weight``)."""
_ALIGNMENT = 32
"""Alignment of tensors in bytes if the file does not set one (ggml, GGUF_DEFAULT_ALIGNMENT)."""

QUANTIZATION_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    32: "BF16",
}  # fmt: skip
"""Common values of ``general.file_type``, numbered as in llama.cpp."""


@dataclass(frozen=True)
class GgufHeader:
    """The parsed header of a GGUF file."""

    values: dict[str, Any]
    """Metadata by key: numbers, booleans, strings, and the arrays that were read, as tuples."""
    lengths: dict[str, int]
    """Lengths of metadata arrays, such as ``tokenizer.ggml.tokens``, and of texts too long to read."""
    tensors: dict[str, tuple[int, ...]]
    """Dimensions by tensor name, the fastest-changing first: (in, out) for a linear weight."""
    tensor_types: dict[str, int] = field(default_factory=dict)
    """Type of each tensor, numbered as ggml's ``ggml_type``."""
    offsets: dict[str, int] = field(default_factory=dict)
    """First byte of each tensor in the file."""
    rope_factors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Values of the float32 vectors of the rotary embedding, by tensor name."""

    @property
    def architecture(self) -> str | None:
        name = self.values.get("general.architecture")
        return name if isinstance(name, str) else None

    @property
    def quantization(self) -> str | None:
        """Return the quantization, such as ``Q4_1``; None if the file does not name it."""
        kind = self.values.get("general.file_type")
        return QUANTIZATION_NAMES.get(kind) if isinstance(kind, int) else None

    @property
    def vocab_size(self) -> int | None:
        table = self.tensors.get("token_embd.weight", ())
        return table[1] if len(table) == 2 else self.lengths.get("tokenizer.ggml.tokens")


class _CorruptFileError(Exception):
    """Raised if the bytes do not follow the format."""


class _Cursor:
    """Reads forward through the file's bytes, never past their end."""

    def __init__(self, data: mmap.mmap, longest_array: int = MAX_ARRAY):
        self.data = data
        self.offset = 0
        self.longest_array = longest_array
        self.text_bytes = 0

    def skip(self, count: int) -> int:
        """Advance by ``count`` bytes; return the offset before them."""
        start = self.offset
        if count < 0 or start + count > len(self.data):
            raise _CorruptFileError
        self.offset = start + count
        return start

    def number(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def text(self) -> str | int:
        """Read a text; return only its length in bytes if it is too long to read."""
        length = int(self.number("<Q"))
        start = self.skip(length)
        if length > MAX_TEXT_BYTES:
            return length
        self.text_bytes += length
        if self.text_bytes > MAX_TEXTS_BYTES:
            raise _CorruptFileError
        try:
            return self.data[start : self.offset].decode()
        except UnicodeDecodeError:
            raise _CorruptFileError from None

    def name(self) -> str:
        """Read a key or a tensor's name."""
        name = self.text()
        if not isinstance(name, str):
            raise _CorruptFileError
        return name

    def array(self, *, texts: bool = False) -> tuple[int, tuple[Any, ...] | None]:
        """Return the length of an array of scalars or strings, and the values if it is short.

        Values of strings are returned only with ``texts``.
        """
        kind, length = self.number("<I"), int(self.number("<Q"))
        is_short = length <= self.longest_array
        if kind in SCALARS:
            start = self.skip(length * struct.calcsize(SCALARS[kind]))
            if is_short:
                layout = f"<{length}{SCALARS[kind][1]}"
                return length, struct.unpack_from(layout, self.data, start)
        elif kind != STRING:
            raise _CorruptFileError
        elif texts and is_short:
            self.text_bytes = 0
            return length, tuple(self.name() for _ in range(length))
        else:
            self._skip_strings(length)
        return length, None

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


def read_gguf(path: Path, *, vocabulary: bool = False) -> GgufHeader:
    """Read the header of ``path``; with ``vocabulary`` also the long arrays of its tokenizer.

    Raises UserError if the file cannot be read or is not GGUF.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data, MAX_TOKENS if vocabulary else MAX_ARRAY), vocabulary)
    except OSError as error:
        raise gguf_problem(path, f"it cannot be read ({error.strerror})", _AGAIN) from None
    except ValueError:
        raise gguf_problem(path, "it is empty", _AGAIN) from None
    except _CorruptFileError:
        raise gguf_problem(path, "it is not a complete GGUF file of version 2 or 3", _AGAIN) from None


_AGAIN = "Download the file again, or choose the model in the Hugging Face format."
_OTHER_FORMAT = (
    "Download the original model in the Hugging Face format (safetensors) and choose it. The page of the "
    "GGUF file names the original model."
)


def gguf_problem(path: Path, what: str, fix: str = _OTHER_FORMAT, *, why: str = "") -> UserError:
    """Build the error for a file that cannot become a base."""
    return UserError("The GGUF file cannot be used", what=f"{path}: {what}.", why=why, fix=fix)


def _read(cursor: _Cursor, vocabulary: bool) -> GgufHeader:
    start = cursor.skip(4)
    if cursor.data[start : cursor.offset] != MAGIC or cursor.number("<I") not in VERSIONS:
        raise _CorruptFileError
    tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
    values: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(value_count):
        key, kind = cursor.name(), cursor.number("<I")
        if key in values or key in lengths:
            raise _CorruptFileError
        if kind == ARRAY:
            lengths[key], array = cursor.array(texts=vocabulary and key.startswith("tokenizer.ggml."))
            if array is not None:
                values[key] = array
        elif kind == STRING:
            text = cursor.text()
            if isinstance(text, str):
                values[key] = text
            else:
                lengths[key] = text
        elif kind in SCALARS:
            values[key] = cursor.number(SCALARS[kind])
        else:
            raise _CorruptFileError
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, int] = {}
    offsets: dict[str, int] = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.name(), cursor.number("<I")
        if name in shapes or dimensions > MAX_DIMENSIONS:
            raise _CorruptFileError
        shapes[name] = tuple(cursor.number("<Q") for _ in range(dimensions))
        types[name], offsets[name] = cursor.number("<I"), cursor.number("<Q")
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _CorruptFileError
    data_start = -(-cursor.offset // alignment) * alignment
    offsets = {name: data_start + offset for name, offset in offsets.items()}
    factors = {}
    for name, shape in shapes.items():
        is_vector = len(shape) == 1 and shape[0] <= MAX_ARRAY and types[name] == _F32
        if name.startswith(_ROPE_FACTORS) and is_vector:
            cursor.offset = offsets[name]
            layout = f"<{shape[0]}f"
            factors[name] = struct.unpack_from(layout, cursor.data, cursor.skip(struct.calcsize(layout)))
    return GgufHeader(values, lengths, shapes, types, offsets, factors)


FileType: TypeAlias = Literal["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
FILE_TYPES: tuple[FileType, ...] = ("BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""File types that the ``gguf`` package writes, the largest first."""
K_QUANTS = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
"""File types that llama.cpp itself writes, the largest first."""
AUTO = "auto"
"""Selects the smallest file type whose answers are close enough to the adapter's."""
LADDER = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""File types that ``auto`` tries, the smallest first."""

_BITS_PER_WEIGHT = {
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.56,
    "Q5_1": 6.0,
    "Q5_K_M": 5.7,
    "Q5_K_S": 5.57,
    "Q5_0": 5.5,
    "Q4_1": 5.0,
    "Q4_K_M": 4.89,
    "Q4_K_S": 4.67,
    "Q4_0": 4.5,
    "Q3_K_L": 4.3,
    "Q3_K_M": 4.0,
    "Q3_K_S": 3.64,
    "Q2_K": 3.16,
}
"""Bits per weight of each file type.

K types are measured on Llama 3.1 8B (llama.cpp, tools/quantize/README.md), and other types calculated from
their blocks.
"""
_Q8_0_BITS = 8.5
_K_BLOCK = 256
_CONTEXT = 4096


def estimated_bytes(architecture: Architecture, file_type: str) -> int:
    """Return the approximate size of a model's GGUF file in bytes, without the vision part.

    An 8.03 B model in Q4_K_M: 8.03e9 · 4.89 / 8 = 4.9 GB. A model whose rows are not made of whole K blocks
    of 256 weights gets larger types, about one step up.
    """
    bits = _BITS_PER_WEIGHT[file_type]
    tables = architecture.embedding_params + architecture.head.own_params
    rest = architecture.total_params - architecture.vision_params - tables
    table_bits = max(bits, _Q8_0_BITS)
    if file_type in K_QUANTS and architecture.hidden_size % _K_BLOCK:
        bits = min(bits + 1.0, _Q8_0_BITS)
    elif file_type in K_QUANTS:
        table_bits = max(bits, _BITS_PER_WEIGHT["Q6_K"])
    return int((rest * bits + tables * table_bits) / 8)


def size_from_parameters(parameters: int, file_type: str) -> int:
    """Return the approximate size of a GGUF file in bytes if only the model's number of parameters is known.

    The embedding and the output head are counted like all other weights, although K types store them in more
    bits: :func:`estimated_bytes` is closer.
    """
    return int(parameters * _BITS_PER_WEIGHT[file_type] / 8)


def spelled(name: str) -> str:
    """Return a type in our spelling, such as ``Q4_K_M`` for ``q4_k_m``; unknown types stay unchanged."""
    names = {kind.lower(): kind for kind in (*FILE_TYPES, *K_QUANTS, AUTO)}
    return names.get(name.lower(), name)


def next_larger(file_type: str) -> str:
    """Return the next larger type that ``auto`` tries, or F16; empty for the largest type."""
    bits = _BITS_PER_WEIGHT[file_type]
    return next((kind for kind in (*LADDER, "F16") if _BITS_PER_WEIGHT[kind] > bits), "")


def rows_without_k_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Return the row lengths that llama.cpp cannot store as K types, in ascending order."""
    text = (module.in_features for module in architecture.modules if module.part != "vision")
    return tuple(sorted({length for length in text if length % _K_BLOCK}))


def bytes_to_run(architecture: Architecture, file_type: str) -> int:
    """Return the approximate memory that llama.cpp needs at a context of 4,096 tokens, in bytes.

    The memory holds the file, and keys and values of every layer in float16.
    """
    cache = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * _CONTEXT * 2
    return estimated_bytes(architecture, file_type) + cache
