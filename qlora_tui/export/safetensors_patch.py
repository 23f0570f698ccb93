"""Changing single tensors of a safetensors file in place, with one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, uint8

from qlora_tui.catalog.safetensors_header import read_header


def change_tensors(file: Path, changes: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Replace each named tensor by ``changes[name](tensor)``, of the same shape and dtype."""
    start, entries = read_header(file)
    for name, change in changes.items():
        with safe_open(file, framework="pt") as content:
            # Copy: the original is a view of the file that is about to change.
            before = content.get_tensor(name).clone()
        after = change(before)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        with file.open("r+b") as content:
            content.seek(start + entries[name]["data_offsets"][0])
            content.write(after.contiguous().view(-1).view(uint8).numpy().data)
