"""Small models made on the spot: folders with real safetensors headers, a cache, GGUF files. No torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "dtype": "float32",
}
TINY_PARAMS = 2 * 64 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors_bytes(size: int = 64) -> bytes:
    """A well-formed safetensors file with one tensor of ``size`` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def make_model(folder: Path, config: dict[str, Any] | None = None, *, shards: int = 1) -> Path:
    """A model folder: config, a tokenizer that says nothing, and weights in ``shards`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes())
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for name in names:
        (folder / name).write_bytes(safetensors_bytes())
    index = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_cached(cache: Path, model_id: str, config: dict[str, Any] | None = None, *, shards: int = 1) -> Path:
    """The same in the layout of the Hugging Face cache; returns the snapshot."""
    root = cache / ("models--" + model_id.replace("/", "--"))
    snapshot = root / "snapshots" / COMMIT
    model_folder = make_model(root / "made", config, shards=shards)
    blobs = root / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model_folder.iterdir())):
        blob = file.rename(blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    model_folder.rmdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def gguf_bytes(
    values: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    vectors: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> bytes:
    """A GGUF file of version 3 with these metadata, tensor names without data, and float32 vectors."""
    body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors) + len(vectors), len(values))
    for key, value in values.items():
        body += _text(key) + _value(value)
    data = b""
    for name, shape in (tensors | {name: (len(vector),) for name, vector in vectors.items()}).items():
        body += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += struct.pack(f"<{len(vectors[name])}f", *vectors[name]) if name in vectors else b""
        data += bytes(-len(data) % 32)
    return body + (bytes(-len(body) % 32) + data if data else b"")


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        case [bool(), *_]:
            return struct.pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
        case list():
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    raise TypeError(value)


TINY_GGUF_VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 3,
    "llama.block_count": 2,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.context_length": 128,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": [f"token {i}" for i in range(64)],
    "tokenizer.ggml.token_type": [1] * 64,
}
TINY_GGUF_TENSORS = {"token_embd.weight": (16, 64), "output.weight": (16, 64), "output_norm.weight": (16,)}


def make_gguf(file: Path, **changes: Any) -> Path:
    """A tiny llama as GGUF; ``changes`` replace metadata (dots written as double underscores)."""
    values = {**TINY_GGUF_VALUES, **{key.replace("__", "."): value for key, value in changes.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gguf_bytes({k: v for k, v in values.items() if v is not None}, TINY_GGUF_TENSORS))
    return file


def make_adapter_files(
    folder: Path,
    names: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj"),
    *,
    layers: int = 2,
    rank: int = 4,
    **settings: Any,
) -> Path:
    """A LoRA adapter on modules of each layer: its config with more settings, the header of its weights."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    entries = {
        f"base_model.model.model.layers.{layer}.{name}.lora_A.weight": {"shape": [rank, 16]}
        for layer in range(layers)
        for name in names
    }
    header = json.dumps(entries).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder
