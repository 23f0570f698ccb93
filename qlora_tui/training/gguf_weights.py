"""Writes what a GGUF file holds as a model folder: bfloat16 safetensors, tokenizer and config.

Which tensors a model has, and under which names, says transformers' class, built from the config without
weights. Their names in the file come from the tables of the ``gguf`` package. A tensor that only one of the
two has refuses the file. What llama.cpp's converter changes about the values is undone.

Weights are written a block of rows at a time: memory holds one float32 block of at most ``BLOCK_BYTES``,
never the whole model. For Gemma 3 270M transformers would need 3.2 GB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import GgufHeader, read_gguf
from qlora_tui.catalog.gguf_config import GgufArchitecture, architecture_of, to_hf_config
from qlora_tui.training.gguf_tokenizer import GgufTokenizer

BLOCK_BYTES = 16 * 2**20
"""Largest block of rows that is dequantized at once, in bytes of float32."""
ProgressCallback = Callable[[int, int], None]
"""Called with the bytes written and the total bytes of the safetensors file."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the safetensors file."""

    name: str
    shape: Shape
    data: Any
    """Its bytes in the GGUF file, (…, bytes of a row), mapped."""
    kind: Any
    """``gguf.GGMLQuantizationType`` of the bytes."""
    change: Callable[[Any], Any] | None = None
    """Applied to the whole tensor in float32, which is then not split into blocks."""

    @property
    def size(self) -> int:
        """Size in the safetensors file, in bytes."""
        return 2 * math.prod(self.shape)


def write_model(file: Path, folder: Path, progress: ProgressCallback) -> None:
    """Write config, tokenizer, chat template and bfloat16 safetensors of a GGUF file.

    Raises UserError and ValueError for a file of which something would be lost.
    """
    header = read_gguf(file, vocabulary=True)
    config = to_hf_config(header, file)
    tokenizer = GgufTokenizer(header)
    if len(tokenizer.tokens) > config["vocab_size"]:
        raise ValueError(f"it has {len(tokenizer.tokens):,} tokens and {config['vocab_size']:,} embeddings")
    tokenizer.write(folder, config.get("max_position_embeddings"))
    del config["dtype"]
    names = {"bos": "bos", "pad": "padding"}
    special: dict[str, Any] = {f"{name}_token_id": tokenizer.special_id(key) for name, key in names.items()}
    special["eos_token_id"] = tokenizer.ends[0] if len(tokenizer.ends) == 1 else tokenizer.ends or None
    weights = weights_of(file, header, config | special, folder, architecture_of(header, file))
    write_weights(weights, folder / "model.safetensors", progress)


def weights_of(
    file: Path, header: GgufHeader, config: Mapping[str, Any], folder: Path, architecture: GgufArchitecture
) -> list[GgufTensor]:
    """Write the configs of the model; return its tensors in the order of the file.

    Raises ValueError for a tensor that only the file or only transformers' class has.
    """
    import gguf
    from transformers.core_model_loading import revert_weight_conversion

    from qlora_tui.training.model_class import build_on_meta

    _check_counts(header, config)
    model = build_on_meta(config)
    # Names as in weight files: an expert's matrices each have one.
    state = revert_weight_conversion(model, model.state_dict())
    expected: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config["tie_word_embeddings"]:
        expected.pop("lm_head.weight", None)
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[header.architecture], config["num_hidden_layers"])
    stored: dict[str, list[str]] = {}
    for name in expected:
        part = _ONE_EXPERT.sub(".experts.", name)
        stored_name = names.get_name(part, try_suffixes=(".weight", ".bias"))
        stored.setdefault(stored_name or f"for {name}", []).append(name)
    factors = header.rope_factors.keys()
    if unknown := [name for name in header.tensors if name not in stored and name not in factors]:
        raise ValueError(f"it has a tensor {unknown[0]}, which {type(model).__name__} has no place for")
    if missing := [name for name in stored if name not in header.tensors]:
        raise ValueError(f"it has no tensor {missing[0]}, which {type(model).__name__} needs")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return [
        weight
        for tensor in header.tensors
        if tensor in stored
        for weight in _split(file, header, tensor, stored[tensor], expected, model.config, architecture)
    ]


def _check_counts(header: GgufHeader, config: Mapping[str, Any]) -> None:
    """Raise ValueError for more layers or experts than the file has tensors of, before they are built."""
    layers = config["num_hidden_layers"]
    if layers > len(header.tensors):
        raise ValueError(f"it counts {layers:,} layers and has {len(header.tensors):,} tensors")
    experts = header.values.get(f"{header.architecture}.expert_count") or 0
    stacked = [shape[-1] for name, shape in header.tensors.items() if name.endswith("_exps.weight") and shape]
    if set(stacked) != ({experts} if experts else set()):
        sizes = " and ".join(map(str, sorted(set(stacked)))) or "none"
        raise ValueError(f"it counts {experts:,} experts and has tensors of {sizes}")


_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def _split(
    file: Path,
    header: GgufHeader,
    tensor: str,
    names: list[str],
    expected: Mapping[str, Shape],
    config: Any,
    architecture: GgufArchitecture,
) -> Iterator[GgufTensor]:
    """Yield the tensors of the model that one of the file holds: one, or one for each expert."""
    # ggml lists dimensions from the fastest-changing one.
    shape = tuple(reversed(header.tensors[tensor]))
    data, kind = _mapped(file, header, tensor, shape)
    experts = _ONE_EXPERT.search(names[0]) is not None
    own = shape[1:] if experts else shape
    if len(names) != (shape[0] if experts else 1):
        raise ValueError(f"its tensor {tensor} stands for {len(names)} tensors of the model")
    for number, name in enumerate(names):
        if expected[name] != own and math.prod(expected[name]) != math.prod(own):
            raise ValueError(f"its tensor {tensor} is {own}, and {name} is {expected[name]}")
        change = _change(name, config, architecture)
        yield GgufTensor(name, expected[name], data[number] if experts else data, kind, change)


def _mapped(file: Path, header: GgufHeader, tensor: str, shape: Shape) -> tuple[Any, Any]:
    """Return the bytes of a tensor, (…, bytes of a row), and their type. Raises ValueError."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(header.tensor_types[tensor])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"its tensor {tensor} has rows that are not made of whole blocks of {block}")
    rows = (*shape[:-1], shape[-1] // block * block_bytes)
    offset = header.offsets[tensor]
    if offset + math.prod(rows) > file.stat().st_size:
        raise ValueError(f"the file ends before its tensor {tensor}")
    return np.memmap(file, np.uint8, "r", offset, rows), kind


def _change(name: str, config: Any, architecture: GgufArchitecture) -> Callable[[Any], Any] | None:
    if architecture.norm_offset and name.endswith("norm.weight"):
        return lambda values: values - architecture.norm_offset
    if architecture.rotates_neighbors and ".q_proj." in name:
        return lambda values: _unpermute_rope(values, config.num_attention_heads)
    if architecture.rotates_neighbors and ".k_proj." in name:
        return lambda values: _unpermute_rope(values, config.num_key_value_heads)
    return None


def _unpermute_rope(values: Any, heads: int) -> Any:
    """Undo llama.cpp's order of the rows of q and k, (rows, columns).

    Its rotary embedding rotates pairs of neighboring rows of a head, (0, 1), (2, 3), …; that of transformers
    pairs a row with the one half a head further, (0, d/2), (1, d/2 + 1), … With d = 4, rows ``0 2 1 3`` of a
    head become ``0 1 2 3``.
    """
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def write_weights(weights: list[GgufTensor], path: Path, progress: ProgressCallback) -> None:
    """Write ``weights`` to ``path`` in the safetensors format. Raises OSError.

    Format: an unsigned 64-bit length, a JSON header of that length, the tensors one after another
    (github.com/huggingface/safetensors, README, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for weight in weights:
        header[weight.name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [total, total + weight.size],
        }
        total += weight.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    progress(done, total)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            for block in _blocks(weight):
                done += out.write(_bfloat16(block))
                progress(done, total)


def _blocks(weight: GgufTensor) -> Iterator[Any]:
    """Yield the tensor in float32, a block of rows at a time."""
    from gguf import dequantize

    if weight.change is not None or len(weight.shape) < 2:
        values = dequantize(weight.data, weight.kind)
        yield weight.change(values) if weight.change else values
        return
    rows = max(1, BLOCK_BYTES // (4 * weight.shape[-1]))
    for start in range(0, weight.shape[0], rows):
        yield dequantize(weight.data[start : start + rows], weight.kind)


def _bfloat16(values: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even, as bits in uint16. NaN stays NaN."""
    import numpy as np

    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)
    halves = rounded.astype(np.uint16)
    halves[np.isnan(values)] = 0x7FC0
    return halves
