"""Converts GGUF files of families whose tensors are known, with any vocabulary, by streaming the weights.

transformers reads configuration and tokenizer from the file's metadata. If it read the weights too, it would
hold all of them at once in float32: 3.2 GB instead of 1.0 GB for Gemma 3 270M.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import read_gguf, rope_base
from qlora_tui.training.clean_files import single_file_view
from qlora_tui.training.gguf_weights import GgufTensor, ProgressCallback, weights_of, write_weights


def write(file: Path, folder: Path, architecture: str, progress: ProgressCallback) -> None:
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
