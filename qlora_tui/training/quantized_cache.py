"""Base weights that were quantized once, stored for the next run, chat or comparison on the same base.

Quantizing 16-bit files takes most of the time from launch to the first step. The 4-bit weights are written in
bitsandbytes' own serialization, bit for bit as they were computed, and read back in a fraction of that time
(docs/measured.md). A folder is valid for one combination of the model's files, the quantization settings, the
compute dtype, the kind of device, and the versions of the libraries. For any other combination the base is
quantized again. The least recently used folders are deleted when the total exceeds ``quantized_cache_gib`` of
``config.toml``.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui import paths
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import is_mxfp4, weight_files
from qlora_tui.errors import UserError
from qlora_tui.files import private_dir
from qlora_tui.formatting import format_bytes
from qlora_tui.locks import locked
from qlora_tui.memory.weights import quantized_experts
from qlora_tui.publishing import discard, draft_path, held_draft, publish
from qlora_tui.recipe.schema import Recipe
from qlora_tui.settings import load_settings
from qlora_tui.training.compute_device import ComputeDevice, free_host_bytes

_FORMAT = 1
"""Format version, increased when the stored format or the set of quantized modules changes."""
_EXPERT_FORMAT = 1
"""Format version of 4-bit experts, increased when their stored format changes."""
_METHODS = ("nf4", "fp4")
_LIBRARIES = ("bitsandbytes", "transformers", "torch")
STORED = re.compile(r"[\w.-]+-[0-9a-f]{16}")
"""Pattern of the folder names that :func:`cache_name` makes. Nothing else is ever deleted."""
_SPARE_BYTES = 1 << 30
"""Bytes that stay free on the disk."""
_SHARD_BYTES = 10**9
"""Maximum size of a weight file in bytes, unless one tensor is larger.

safetensors copies all tensors of a file from the GPU to host memory before it writes the first.
"""


def quantized_dir() -> Path:
    """Return the folder with one subfolder for each quantized base."""
    return private_dir(paths.cache_dir() / "quantized")


def cache_path(folder: Path, recipe: Recipe, device: ComputeDevice) -> Path | None:
    """Return the folder for the quantized weights of a base, recipe and device, whether or not it exists.

    Returns:
        None if the weights are not stored: they are not quantized to 4 bits, they are quantized in their
            files already, or caching is turned off.
    """
    if recipe.quantization.method not in _METHODS or not limit_bytes():
        return None
    config = load_config(folder / "config.json")
    if config.get("quantization_config") and not is_mxfp4(config):
        return None
    state = {
        "format": _FORMAT,
        "folder": str(folder.resolve()),
        "config": config,
        "files": weights_state(folder),
        "method": recipe.quantization.method,
        "double": recipe.quantization.double_quantization,
        "dtype": device.dtype_name,
        "device": device.kind,
        "versions": [version(name) for name in _LIBRARIES],
        **({"skip": recipe.quantization.skip} if recipe.quantization.skip else {}),
        **({"experts": _EXPERT_FORMAT} if quantizes_experts(folder, recipe) else {}),
    }
    return quantized_dir() / cache_name(recipe, state, recipe.quantization.method)


def cache_name(recipe: Recipe, state: dict[str, Any], *words: str) -> str:
    """Return a cache name for a recipe's base: the model, ``words``, and a hash of ``state``."""
    key = hashlib.sha256(msgspec.json.encode(state)).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", Path(recipe.model.id).name) or "model"
    return "-".join((name, *words, key))


def base_state(format_number: int, folder: Path, recipe: Recipe, device: ComputeDevice) -> dict[str, Any]:
    """Return the values on which the answers of a base depend, to identify stored answers.

    These are the files and the quantization of the base, the compute dtype, and the kind of device.

    Args:
        format_number: version of the cached format; a new number invalidates everything stored before.
        folder: the model's files.
    """
    return {
        "format": format_number,
        "folder": str(folder.resolve()),
        "files": weights_state(folder),
        "quantization": recipe.quantization,
        "dtype": device.dtype_name,
        "device": device.kind,
    }


def weights_state(folder: Path) -> list[tuple[int, int]]:
    """Return size and modification time of each weight file of a model, which identify its state."""
    files = [(folder / name).stat() for name in weight_files(folder)]
    return [(file.st_size, file.st_mtime_ns) for file in files]


def quantizes_experts(folder: Path, recipe: Recipe) -> bool:
    """Return whether the base in ``folder`` is a mixture whose experts the recipe quantizes to 4 bits."""
    from qlora_tui.training.description import architecture_of  # imports torch

    config = load_config(folder / "config.json")
    return quantized_experts(recipe.quantization, architecture_of(config)) != "none"


def is_stored(folder: Path | None) -> bool:
    """Return whether the weights are stored. A folder is written completely or not at all."""
    return folder is not None and (folder / "config.json").is_file()


def store(model: Any, folder: Path) -> None:
    """Write the weights of a loaded model.

    Nothing is written if another process is writing weights, if disk space or host memory is short, or if the
    weights are larger than the cache may be.
    A full disk, or any other OSError, loses only the stored weights and not the run.
    """
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    size, limit = sum(sizes), limit_bytes()
    try:
        if size > limit or shutil.disk_usage(folder.parent).free < 2 * size + _SPARE_BYTES:
            return
        if (free := free_host_bytes()) < min(size, max(_SHARD_BYTES, *sizes)):
            print(
                f"The quantized weights were not stored: host memory has only {format_bytes(free)} free.",
                flush=True,
            )
            return
        with locked(folder.parent / ".lock") as lock:
            if lock is None or is_stored(folder):
                return
            with held_draft(draft_path(folder)) as draft:
                if draft is None:
                    return
                model.save_pretrained(draft, max_shard_size=_SHARD_BYTES)
                publish(draft, folder)
            _delete_beyond(limit, newest=folder)
    except (OSError, UserError) as error:
        print(f"The quantized weights could not be stored: {error}", flush=True)


def limit_bytes() -> int:
    """Return the largest number of bytes that all folders may take.

    0 turns the cache off, which also happens if ``config.toml`` has errors.
    """
    try:
        return round(load_settings().quantized_cache_gib * 2**30)
    except UserError:
        return 0


def _delete_beyond(limit: int, *, newest: Path) -> None:
    """Delete the least recently used folders until the total is within ``limit`` bytes."""
    folders = [path for path in newest.parent.iterdir() if STORED.fullmatch(path.name) and is_stored(path)]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in folders}
    total = sum(sizes.values())
    for path in sorted(folders, key=lambda each: each.stat().st_mtime):
        if total <= limit:
            return
        if path != newest:
            discard(path)
            total -= sizes[path]
