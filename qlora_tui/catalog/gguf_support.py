"""What of a GGUF file becomes part of the model, and what is refused because it would be lost.

transformers reads sizes, the base of rotary positions and the names of tensors. What else llama.cpp would
compute with must have the value that the converted model computes with: a scale or a window that is left out
raises no error, only another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_tui.catalog.gguf_header import GgufHeader

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
