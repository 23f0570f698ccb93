"""Tensors of a base's weight files. Experts in MXFP4 are read as 16-bit matrices.

gpt-oss stores ``experts.down_proj`` as ``experts.down_proj_blocks`` and ``_scales``. This module treats both
as one tensor, with the name and shape that it has in a 16-bit model: (experts, inputs, outputs). The values
are exact: an MXFP4 number is one of 16 values times a power of two, which bfloat16 can represent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_tui.catalog.model_validation import read_header, weight_files
from qlora_tui.training.experts.storage import BLOCKS, SCALES, dequantize_mxfp4

_BLOCK = 32
"""Number of weights in an MXFP4 block."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch dtypes by their safetensors names."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors."""
    is_packed: bool = False
    """Whether the file stores it in MXFP4."""

    @property
    def bytes(self) -> int:
        """Size of the unpacked values."""
        kind = _DTYPES.get(self.dtype)
        return math.prod(self.shape) * (kind.itemsize if kind else 1)


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a weight file by name, in its order. Raises OSError and ValueError."""
    tensors = {}
    for name, entry in read_header(file)[1].items():
        shape = tuple(entry.get("shape", ()))
        if name == "__metadata__" or name.endswith(f"_proj{SCALES}"):
            continue
        if name.endswith(f"_proj{BLOCKS}"):
            experts, outputs, blocks, _ = shape
            shape = (experts, blocks * _BLOCK, outputs)
            tensors[name.removesuffix(BLOCKS)] = StoredTensor(shape, "BF16", is_packed=True)
        else:
            tensors[name] = StoredTensor(shape, entry["dtype"])
    return tensors


def read_tensor(file: Path, name: str) -> Tensor:
    """Return a tensor of a weight file. Raises OSError."""
    status = file.stat()
    content, names = _opened(file, (status.st_ino, status.st_mtime_ns, status.st_size))
    if name in names:
        # Copy the tensor, because the original is a view of the mapped file.
        tensor: Tensor = content.get_tensor(name).clone()
        return tensor
    blocks = read_tensor(file, name + BLOCKS)
    files = (file, *(file.parent / each for each in weight_files(file.parent)))
    scales = read_tensor(next(each for each in files if name + SCALES in read_header(each)[1]), name + SCALES)
    experts, outputs, count = scales.shape
    unpacked = torch.empty(experts, count * _BLOCK, outputs, dtype=torch.bfloat16)
    for expert, pair in enumerate(zip(blocks, scales, strict=True)):
        unpacked[expert] = dequantize_mxfp4(*pair, torch.bfloat16).T
    return unpacked


@lru_cache(maxsize=2)
def _opened(file: Path, _state: tuple[int, int, int]) -> tuple[Any, frozenset[str]]:
    """Return a memory-mapped weight file and the names of its tensors.

    Both are cached, because parsing the names again for each tensor took 1 ms. The cache has room for two
    files, because experts may be spread over two files.
    """
    content: Any = safe_open(file, framework="pt")
    return content, frozenset(content.keys())


def write_unpacked(file: Path, target: Path, read: Callable[[str], Tensor]) -> None:
    """Write a weight file with the tensors of ``file``, all unpacked, one in memory at a time.

    ``read`` returns the values of a tensor by name. Raises OSError.
    """
    tensors = stored_tensors(file)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as copy:
        copy.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = read(name).to(_DTYPES[tensor.dtype]).contiguous()
            assert values.nbytes == tensor.bytes
            copy.write(values.view(-1).view(torch.uint8).numpy().data)


def write_unpacked_config(base: Path, folder: Path, files: Iterable[Path]) -> None:
    """Write config and index of a model whose packed tensors were unpacked. Raises OSError."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if (base / _INDEX).is_file():
        tensors = [(name, file.name, each) for file in files for name, each in stored_tensors(file).items()]
        index = {
            "metadata": {"total_size": sum(tensor.bytes for _, _, tensor in tensors)},
            "weight_map": {name: file for name, file, _ in tensors},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
