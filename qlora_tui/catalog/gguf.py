"""GGUF files: their header, what of them becomes part of a model, and the types that are exported.

This parser exists because the ``gguf`` package imports numpy, which the app must start without. Format:
github.com/ggml-org/ggml, docs/gguf.md. Arrays are skipped, not read: only their lengths are kept.

transformers reads sizes, the base of rotary positions and the names of tensors. What else llama.cpp would
compute with must have the value that the converted model computes with: a scale or a window that is left out
raises no error, only another model. So ``not_understood`` names what would be lost, and the file is refused.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
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

QUANTIZATION_NAMES = {
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
        return QUANTIZATION_NAMES.get(self.values.get("general.file_type", -1))

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
    if lost := not_understood(header, architecture):
        raise _gguf_problem(
            path, f"{lost} would be lost, and another model be trained than the file holds", is_complete=True
        )
    if architecture == "llama" and "head_dim" not in config:
        config["head_dim"] = header.values.get("llama.rope.dimension_count")
    config.setdefault("vocab_size", header.vocab_size)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["dtype"] = header.quantization
    return config


_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_UNGATED = {part: name for part, name in _LINEAR.items() if part.startswith("attn")} | {
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_IN_A_LAYER = {
    "llama": _LINEAR | _TWO_NORMS,
    "qwen2": _LINEAR | _TWO_NORMS,
    "qwen3": _LINEAR | _TWO_NORMS | _HEAD_NORMS,
    "phi3": _FUSED | _TWO_NORMS,
    "gemma2": _LINEAR | _FOUR_NORMS,
    "gemma3": _LINEAR | _FOUR_NORMS | _HEAD_NORMS,
    "starcoder2": _UNGATED | _TWO_NORMS,
}
"""For each ``general.architecture``, the parts of a layer: llama.cpp's name to transformers' name."""
_WHOLE_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")

_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "rope.freq_base",
}
"""Keys of every architecture that the converted config has."""
_ABOUT_THE_FILE = {
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
}
"""Keys that change nothing by themselves: another key or tensor says what is computed."""
_DEFAULT_ROPE_BASE = 10_000.0
"""Of llama.cpp, where a file names none."""
_GEMMA: dict[str, tuple[int, int]] = {"gemma2": (46, 2), "gemma3": (62, 6)}
"""Layers by which llama.cpp recognizes the 27B, which scales attention otherwise (src/models/gemma*.cpp), and
of how many layers the last one has no window."""
_GEMMA_SCALAR = 256
"""``query_pre_attn_scalar`` of the class, which transformers reads from no GGUF file."""


def name_of(tensor: str, architecture: str | None) -> str | None:
    """The name in transformers of a tensor in a GGUF file; None where it is unknown."""
    parts = _IN_A_LAYER.get(architecture or "")
    match = _TENSOR.fullmatch(tensor)
    if parts is None or match is None:
        return None
    layer, part, kind = match.groups()
    if layer is None:
        whole = _WHOLE_MODEL.get(part)
        return whole and f"{whole}.{kind}"
    inner = parts.get(part)
    return inner and f"model.layers.{layer}.{inner}.{kind}"


def not_understood(header: GgufHeader, architecture: str) -> str | None:
    """Name the first thing in a file that would be lost: a key with its value, or a tensor; None for none."""
    return next(_lost(header, architecture), None)


def _lost(header: GgufHeader, architecture: str) -> Iterator[str]:
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)
    }
    expected = _computed(values, architecture)
    for key, value in values.items():
        if key in _READ | _ABOUT_THE_FILE or (key not in expected and not value):
            continue  # llama.cpp's default is 0, for what it leaves out
        if key not in expected:
            yield f"{prefix}{key} ({_words(value)})"
        elif not _same(value, expected[key]):
            yield f"{prefix}{key} of {_words(value)} (only {_words(expected[key])})"
    for key, length in header.lengths.items():
        if key.startswith(prefix):
            yield f"{key} ({length:,} values)"
    if (files := _count(header.values, "split.count")) > 1:
        yield f"split.count ({files}: the rest of the model is in other files)"
    if architecture in _GEMMA and (scalar := _gemma_scalar(values, architecture)) != _GEMMA_SCALAR:
        yield f"the scale of its attention (1/√{scalar}, only 1/√{_GEMMA_SCALAR})"
    for tensor in header.tensors:
        if name_of(tensor, architecture) is None:
            yield f"the tensor {tensor}"


def _computed(values: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The values of the converted model, of keys that its config does not have from the file."""
    width = _count(values, "attention.key_length") or _usual_width(values)
    if architecture == "llama":
        width = _count(values, "rope.dimension_count") or width
    elif architecture == "qwen3":
        width = 128
    window = _count(values, "attention.sliding_window")
    computed = {
        "attention.sliding_window": window if window >= _count(values, "context_length") else 0,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "attention.scale": width**-0.5 if width else 0.0,
        "attention.causal": True,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.attn_factor": 1.0,
    }
    epsilon = "layer_norm_epsilon" if architecture == "starcoder2" else "layer_norm_rms_epsilon"
    computed[f"attention.{epsilon}"] = values.get(f"attention.{epsilon}")
    if architecture in _GEMMA:
        computed |= {
            "attention.scale": _GEMMA_SCALAR**-0.5,
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": _GEMMA[architecture][1],
        }
    if architecture == "gemma2":
        computed |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if architecture == "gemma3":
        computed["rope.freq_base_swa"] = _DEFAULT_ROPE_BASE
    return computed


def _gemma_scalar(values: dict[str, Any], architecture: str) -> int:
    if values.get("block_count") == _GEMMA[architecture][0]:
        return _usual_width(values)
    return _count(values, "attention.key_length") or _GEMMA_SCALAR


def _usual_width(values: dict[str, Any]) -> int:
    """The width of a head where the file does not name it."""
    return _count(values, "embedding_length") // max(_count(values, "attention.head_count"), 1)


def _count(values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def rope_base(values: dict[str, Any], architecture: str) -> float:
    """The base of rotary positions: of all layers, or of those with full attention."""
    base = values.get(f"{architecture}.rope.freq_base")
    return float(base) if isinstance(base, (int, float)) and base else _DEFAULT_ROPE_BASE


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(value, expected, rel_tol=1e-6)
    return bool(value == expected)


def _words(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


FileType: TypeAlias = Literal["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
FILE_TYPES: tuple[FileType, ...] = ("BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the ``gguf`` package writes, the largest first."""
K_QUANTS = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
"""Types that llama.cpp itself writes, the largest first."""
AUTO = "auto"
"""The smallest type whose answers are near enough to the adapter's."""
LADDER = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""Types that ``auto`` tries, the smallest first."""

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
"""K types: measured on Llama 3.1 8B (llama.cpp, tools/quantize/README.md); others: from their blocks."""
_Q8_0_BITS = 8.5
_K_BLOCK = 256
_CONTEXT = 4096


def estimated_bytes(architecture: Architecture, file_type: str) -> int:
    """Return the approximate size of the GGUF file of a model, without what reads images.

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


def spelled(name: str) -> str:
    """Return a type as it is spelled here, such as ``Q4_K_M`` for ``q4_k_m``; an unknown one as it is."""
    names = {kind.lower(): kind for kind in (*FILE_TYPES, *K_QUANTS, AUTO)}
    return names.get(name.lower(), name)


def next_larger(file_type: str) -> str:
    """Return the next larger type that ``auto`` tries, or F16; empty for the largest."""
    bits = _BITS_PER_WEIGHT[file_type]
    return next((kind for kind in (*LADDER, "F16") if _BITS_PER_WEIGHT[kind] > bits), "")


def rows_without_k_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Return the lengths of rows that llama.cpp cannot store as K types, in ascending order."""
    text = (module.in_features for module in architecture.modules if module.part != "vision")
    return tuple(sorted({length for length in text if length % _K_BLOCK}))


def bytes_to_run(architecture: Architecture, file_type: str) -> int:
    """Return the approximate memory that llama.cpp needs at a context of 4,096 tokens.

    The file, and keys and values of every layer in float16.
    """
    cache = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * _CONTEXT * 2
    return estimated_bytes(architecture, file_type) + cache
