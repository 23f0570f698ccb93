"""Changing single tensors of a safetensors file in place, one in memory at a time.

The layout (eight bytes of header length, a JSON header with ``data_offsets``, the data) is that of
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, uint8


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file and its shape."""
    return {name: tuple(entry["shape"]) for name, entry in _header(file)[1].items() if name != "__metadata__"}


def change_tensors(file: Path, changes: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Put ``changes[name](tensor)``, of the same shape and dtype, in place of each named tensor."""
    start, header = _header(file)
    for name, change in changes.items():
        with safe_open(file, framework="pt") as content:
            # A copy: the original is a view of the file that is about to change.
            before = content.get_tensor(name).clone()
        after = change(before)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        with file.open("r+b") as content:
            content.seek(start + header[name]["data_offsets"][0])
            content.write(after.contiguous().view(-1).view(uint8).numpy().data)


def _header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        return 8 + size, json.loads(content.read(size))
