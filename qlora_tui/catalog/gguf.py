"""The header of GGUF files.

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
from typing import Any

from qlora_tui.catalog.gguf_file_types import FILE_TYPES
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

_TYPE_NAMES = {0: "F32"} | {each.number: each.name for each in FILE_TYPES.values()}
"""Names of common values of ``general.file_type``."""


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
        return _TYPE_NAMES.get(kind) if isinstance(kind, int) else None

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
