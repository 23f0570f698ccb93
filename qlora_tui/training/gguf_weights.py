"""Writes a GGUF file as a model folder: bfloat16 safetensors, tokenizer and config.

transformers' class, built from the config without weights, determines the model's tensors and their names.
llama.cpp stores some tensors in another form, which :mod:`qlora_tui.gguf_format` defines for exports. This
module restores the original form. If a tensor is only in the file or only in the model, the file is refused.
Weights are written one block of rows at a time, or one matrix at a time if they are stored in another order,
so memory never holds the whole model. transformers would need 3.2 GB to convert Gemma 3 270M.

:func:`convert` is a job of :mod:`qlora_tui.training.gguf_conversion`, so that the memory of the conversion is
released with the process. transformers can dequantize a GGUF file but not quantize it to NF4 at the same
time, so the weights are written to disk in between.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import GgufHeader, gguf_problem, read_gguf
from qlora_tui.catalog.gguf_config import to_hf_config
from qlora_tui.errors import UserError, first_line
from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.publishing import draft_path, held_draft, publish
from qlora_tui.training.failures import is_full_disk
from qlora_tui.training.gguf_tokenizer import GgufTokenizer
from qlora_tui.worker import Report

BLOCK_BYTES = 16 * 2**20
"""Maximum size of a block of rows that is dequantized at once, in bytes of float32."""
ProgressCallback = Callable[[int, int], None]
"""Called with the bytes written and the total bytes of the safetensors file."""
Shape = tuple[int, ...]
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Weight:
    """One tensor of the safetensors file."""

    name: str
    shape: Shape
    blocks: Callable[[], Iterator[Any]]
    """Yields the tensor's elements in order, as arrays of float32."""

    @property
    def size(self) -> int:
        """Size in the safetensors file, in bytes."""
        return 2 * math.prod(self.shape)


def write_model(file: Path, folder: Path, progress: ProgressCallback) -> None:
    """Write config, tokenizer, chat template and bfloat16 safetensors of a GGUF file.

    Raises UserError if the file cannot be a base, and ValueError if a tensor is only in the file or only in
    the model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from qlora_tui.training.model_class import build_on_meta

    header = read_gguf(file, vocabulary=True)
    config = write_description(header, file, folder)
    del config["dtype"]
    _check_counts(header, config)
    model = build_on_meta(config)
    # Names as in weight files, where each matrix of an expert has its own name.
    state = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights = list(weights_of(file, header, shapes, model.config))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_weights(weights, folder / "model.safetensors", progress)


def write_description(header: GgufHeader, file: Path, folder: Path) -> dict[str, Any]:
    """Write config, tokenizer and chat template of a file, and return the config.

    Needs no weights. ``header`` was read with its vocabulary. Raises UserError for a file that cannot be a
    base.
    """
    config = to_hf_config(header, file)
    try:
        tokenizer = GgufTokenizer(header)
        if len(tokenizer.tokens) > config["vocab_size"]:
            raise ValueError(
                f"it has {len(tokenizer.tokens):,} tokens and {config['vocab_size']:,} embeddings"
            )
        tokenizer.write(folder, config.get("max_position_embeddings"))
    except ValueError as error:
        raise gguf_problem(file, str(error)) from error
    names = {"bos": "bos", "pad": "padding"}
    config |= {f"{name}_token_id": tokenizer.special_id(key) for name, key in names.items()}
    config["eos_token_id"] = tokenizer.ends[0] if len(tokenizer.ends) == 1 else tokenizer.ends or None
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _check_counts(header: GgufHeader, config: Mapping[str, Any]) -> None:
    """Raise ValueError if the config has more layers than the file has tensors, or the experts do not match.

    The number of experts in the header must be the number that each tensor of experts holds.
    """
    layers = config["num_hidden_layers"]
    if layers > len(header.tensors):
        raise ValueError(f"it declares {layers:,} layers but has {len(header.tensors):,} tensors")
    experts = header.values.get(f"{header.architecture}.expert_count") or 0
    stacked = [shape[-1] for name, shape in header.tensors.items() if name.endswith("_exps.weight") and shape]
    if set(stacked) != ({experts} if experts else set()):
        sizes = " and ".join(map(str, sorted(set(stacked)))) or "none"
        raise ValueError(f"it declares {experts:,} experts but has tensors of {sizes}")


def weights_of(file: Path, header: GgufHeader, shapes: Mapping[str, Shape], config: Any) -> Iterator[Weight]:
    """Yield the tensors of a model, read from those of a file.

    Args:
        file: the GGUF file.
        header: its header.
        shapes: shapes of the model's tensors, keyed by their names in weight files.
        config: transformers' config of the model.

    Raises:
        ValueError: a tensor is only in the file or only in the model, or a shape differs.
    """
    from qlora_tui.gguf_format.inverse import sources_of

    sources = sources_of(shapes, header.architecture or "", config)
    stored = {tensor.name: tensor.shape for source in sources for tensor in source.stored}
    known = stored.keys() | header.rope_factors.keys() | _later_tokens(header, config.num_hidden_layers)
    if unknown := [name for name in header.tensors if name not in known]:
        raise ValueError(f"it has a tensor {unknown[0]}, which {config.model_type} has no place for")
    for name, shape in stored.items():
        # ggml lists dimensions from the fastest-changing one, and omits leading dimensions of 1.
        own = tuple(reversed(header.tensors.get(name, ())))
        if not own:
            raise ValueError(f"it has no tensor {name}, which {config.model_type} needs")
        if _without_ones(own) != _without_ones(shape):
            raise ValueError(f"its tensor {name} is {own}, and {config.model_type} needs {shape}")
    for source in sources:
        data = [_mapped(file, header, tensor.name, tensor.shape) for tensor in source.stored]
        for number, name in enumerate(source.names):
            # The file has a tensor for each expert, or one for all experts.
            experts = range(number, number + 1) if len(source.names) > 1 else None
            shape = source.shape[1:] if experts else source.shape
            yield Weight(name, shape, partial(_elements, source, data, experts))


def _later_tokens(header: GgufHeader, layers: int) -> set[str]:
    """Return the tensors of the last layers, which only predict tokens after the next one."""
    if not header.values.get(f"{header.architecture}.nextn_predict_layers"):
        return set()
    matches = ((name, _LAYER.match(name)) for name in header.tensors)
    return {name for name, match in matches if match and int(match[1]) >= layers}


def _without_ones(shape: Shape) -> Shape:
    return tuple(length for length in shape if length != 1)


def _mapped(file: Path, header: GgufHeader, tensor: str, shape: Shape) -> tuple[Any, Any]:
    """Return the bytes of a tensor (…, bytes of a row) and their type. Raises ValueError."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(header.tensor_types[tensor])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"its tensor {tensor} has rows whose length is not a multiple of {block}")
    rows = (*shape[:-1], shape[-1] // block * block_bytes)
    offset = header.offsets[tensor]
    if offset + math.prod(rows) > file.stat().st_size:
        raise ValueError(f"the file ends before its tensor {tensor}")
    return np.memmap(file, np.uint8, "r", offset, rows), kind


def _elements(source: Any, data: list[tuple[Any, Any]], experts: range | None) -> Iterator[Any]:
    """Yield the elements of a tensor in float32, or only those at some indices of its first dimension."""
    import torch
    from gguf import dequantize

    (first, kind), *others = data
    if not others and source.origins[0].is_same:
        for part in first[experts.start : experts.stop] if experts else [first]:
            rows = part.reshape(-1, part.shape[-1])
            step = max(1, BLOCK_BYTES // (4 * max(1, source.shape[-1])))
            for start in range(0, len(rows), step):
                yield dequantize(rows[start : start + step], kind)
        return
    apart = len(source.shape) > 2 and all(origin.keeps_first for origin in source.origins)
    whole = experts or range(source.shape[0])
    for chosen in [range(one, one + 1) for one in whole] if apart else [range(source.shape[0])]:
        original = torch.empty((len(chosen), *source.shape[1:]), dtype=torch.float32)
        for (stored, kind), origin in zip(data, source.origins, strict=True):
            part = stored[chosen.start : chosen.stop] if apart else stored
            values = dequantize(part, kind)
            # A float32 tensor is the file itself, which is mapped read-only.
            values = values if values.flags.writeable else values.copy()
            origin.restore(torch.from_numpy(values), original)
        yield (original if apart or experts is None else original[experts.start : experts.stop]).numpy()


def write_weights(weights: list[Weight], path: Path, progress: ProgressCallback) -> None:
    """Write ``weights`` to ``path`` in the safetensors format. Raises OSError.

    The format is an unsigned 64-bit length, a JSON header of that length, the tensors one after another
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
            for block in weight.blocks():
                done += out.write(_bfloat16(block))
                progress(done, total)


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


def convert(file: Path, folder: Path, report: Report = lambda done, total, text="": None) -> None:
    """Write ``folder`` completely or not at all. Raises UserError.

    Waits for another process that is converting the same file, and then does nothing if that process
    succeeded.
    """
    from safetensors import SafetensorError  # not an OSError, even if the disk is full

    with _conversion_lock(folder):
        if (folder / "config.json").exists():
            return
        try:
            with held_draft(draft_path(folder)) as draft:
                # Only the process that holds the lock writes the draft, so the draft is never None.
                assert draft is not None
                write_model(file, draft, report)
                publish(draft, folder)
        except (
            *(OSError, ValueError, KeyError, ImportError, NotImplementedError),
            *(MemoryError, RuntimeError, SafetensorError),
        ) as error:
            raise _problem(file, error) from error


@contextmanager
def _conversion_lock(folder: Path) -> Iterator[None]:
    """Hold the lock file next to ``folder``; the kernel releases it however this process ends."""
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _problem(file: Path, error: Exception) -> UserError:
    reason = first_line(error)
    if is_full_disk(error):
        fix = "Free some space, or set XDG_CACHE_HOME to a folder on another disk."
    elif is_out_of_memory(error):
        reason, fix = "The machine is out of memory.", "Close other programs and try again."
    else:
        fix = "Choose the model's safetensors folder or Hub id instead."
    return UserError("The GGUF file could not be converted", what=f"{file}: {reason}", fix=fix)
