"""Writes what a GGUF file holds as a model folder: bfloat16 safetensors, tokenizer and config.

Weights are written a block of rows at a time: memory holds one float32 block of at most ``BLOCK_BYTES``,
never the whole model. Changes that llama.cpp's converter (``convert_hf_to_gguf.py``) makes to the values are
undone.

A plain Llama, such as the demo's model, is read once, in a quarter of the time that transformers takes, with
the tokenizer that its publisher intended: transformers loses the rule that digits are split. For the other
families transformers reads configuration and tokenizer. If it read the weights too, it would hold all of them
at once in float32: 3.2 GB instead of 1.0 GB for Gemma 3 270M. What the keys mean: github.com/ggml-org/ggml,
docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qlora_tui.catalog.gguf import GgufHeader, name_of, read_gguf, rope_base
from qlora_tui.training.clean_files import single_file_view

BLOCK_BYTES = 16 * 2**20
"""Largest block of rows that is dequantized at once, in bytes of float32."""
ProgressCallback = Callable[[int, int], None]
"""Called with the bytes written and the total bytes of the safetensors file."""
Shape = tuple[int, ...]

_NORMS_PLUS_ONE = ("gemma2", "gemma3")
"""Architectures whose norms multiply by 1 + w in transformers, but by w in llama.cpp."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the safetensors file."""

    name: str
    shape: Shape
    tensor: Any
    """``gguf.ReaderTensor``: a view of the mapped GGUF file."""
    change: Callable[[Any], Any] | None = None
    """Applied to the whole tensor in float32, which is then not split into blocks."""

    @property
    def size(self) -> int:
        """Size in the safetensors file, in bytes."""
        count = 2
        for length in self.shape:
            count *= length
        return count


def weights_of(reader: Any, architecture: str, heads: int, kv_heads: int) -> list[GgufTensor]:
    """All tensors of a ``gguf.GGUFReader`` in the order of the file. Raises ValueError for an unknown one."""
    weights = []
    for tensor in reader.tensors:
        name = name_of(tensor.name, architecture)
        if name is None:
            raise ValueError(f"its tensor {tensor.name} is unknown")
        # ggml lists dimensions from the fastest-changing one.
        shape = tuple(int(length) for length in reversed(tensor.shape))
        weights.append(GgufTensor(name, shape, tensor, _change(name, architecture, heads, kv_heads)))
    return weights


def _change(name: str, architecture: str, heads: int, kv_heads: int) -> Callable[[Any], Any] | None:
    if architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
        return lambda values: values - 1
    if architecture == "llama" and ".q_proj." in name:
        return lambda values: _unpermute_rope(values, heads)
    if architecture == "llama" and ".k_proj." in name:
        return lambda values: _unpermute_rope(values, kv_heads)
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

    tensor = weight.tensor
    if weight.change is not None or len(weight.shape) < 2:
        values = dequantize(tensor.data, tensor.tensor_type)
        yield weight.change(values) if weight.change else values
        return
    rows = max(1, BLOCK_BYTES // (4 * weight.shape[-1]))
    for start in range(0, weight.shape[0], rows):
        yield dequantize(tensor.data[start : start + rows], tensor.tensor_type)


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


KIND = ("gpt2", "smollm")
"""``tokenizer.ggml.model`` and ``.pre`` of the supported kind of vocabulary."""
CONTROL = 3
"""``token_type`` of a control token, such as the begin or end of a turn."""


def tokenizer_from(header: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer from a file's metadata, which must be of the kind ``KIND``."""
    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = header["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == CONTROL
        ]
    )
    return tokenizer


_NEEDED = (
    "tokenizer.chat_template",
    *(f"tokenizer.ggml.{special}_token_id" for special in ("bos", "eos", "padding", "unknown")),
)


def is_known(header: GgufHeader) -> bool:
    """Whether the file is a plain Llama with a supported vocabulary, and nothing is missing.

    What is unknown is refused before (``catalog.gguf``).
    """
    kind = (header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.pre"))
    return (
        header.architecture == "llama"
        and kind == KIND
        and all(key in header.values for key in _NEEDED)
        and not any(tensor.endswith(".bias") for tensor in header.tensors)
    )


def write_llama(file: Path, folder: Path, progress: ProgressCallback) -> None:
    """Write config, tokenizer, chat template and bfloat16 safetensors of a file that ``is_known``."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    header = {key: field.contents() for key, field in reader.fields.items()}
    _write_tokenizer(header, folder)
    _write_llama_config(header, reader, folder)
    heads, kv_heads = header["llama.attention.head_count"], header["llama.attention.head_count_kv"]
    write_weights(weights_of(reader, "llama", heads, kv_heads), folder / "model.safetensors", progress)


def _write_tokenizer(header: dict[str, Any], folder: Path) -> None:
    tokens = header["tokenizer.ggml.tokens"]
    tokenizer_from(header).save(str(folder / "tokenizer.json"))
    special = {
        name: tokens[header[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": header["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
    (folder / "chat_template.jinja").write_text(header["tokenizer.chat_template"], encoding="utf-8")


def _write_llama_config(header: dict[str, Any], reader: Any, folder: Path) -> None:
    special = {
        f"{name}_token_id": header[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    heads = header["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(header["tokenizer.ggml.tokens"]),
        "hidden_size": header["llama.embedding_length"],
        "intermediate_size": header["llama.feed_forward_length"],
        "num_hidden_layers": header["llama.block_count"],
        "num_attention_heads": heads,
        "head_dim": header.get("llama.rope.dimension_count") or header["llama.embedding_length"] // heads,
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "max_position_embeddings": header["llama.context_length"],
        # A float32 printed with as many digits as it holds, so that 1e-05 stays 1e-05.
        "rms_norm_eps": float(f"{header['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": rope_base(header, "llama"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        **special,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_streamed(file: Path, folder: Path, architecture: str, progress: ProgressCallback) -> None:
    """Write the folder of a file of a family whose tensors are known.

    Raises ValueError where the model that transformers builds from the configuration has other tensors.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    with single_file_view(file) as view, one_reader_per_file():
        place: dict[str, Any] = {
            "pretrained_model_name_or_path": str(view),
            "gguf_file": file.name,
            "local_files_only": True,
            "trust_remote_code": False,
        }
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
        config: Any = AutoConfig.from_pretrained(**place)
        reader = gguf.GGUFReader(str(view / file.name))
    rope = config.rope_parameters
    base = rope_base(read_gguf(file).values, architecture)
    # transformers reads the base of some families only, and has others where the file names none.
    rope.get("full_attention", rope)["rope_theta"] = base
    weights = weights_of(reader, architecture, config.num_attention_heads, config.num_key_value_heads)
    _write_config(config, folder, weights)
    write_weights(weights, folder / "model.safetensors", progress)


@contextmanager
def one_reader_per_file() -> Iterator[None]:
    """Make all users of ``gguf.GGUFReader`` share one reader for each file.

    transformers opens one for the tokenizer and one for the configuration, and each reads the vocabulary
    entry by entry: 15 s for the 262,144 of Gemma 3.
    """
    import gguf

    original = gguf.GGUFReader
    gguf.GGUFReader = lru_cache(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _write_config(config: Any, folder: Path, weights: list[GgufTensor]) -> None:
    """Write what ``save_pretrained`` writes besides the weights, from a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers'
            config, dtype=torch.bfloat16
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    written = {weight.name: weight.shape for weight in weights}
    different = sorted(name for name in {*expected, *written} if expected.get(name) != written.get(name))
    if different:
        raise ValueError(f"its tensors are not those of {type(model).__name__}: {', '.join(different[:3])}")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
