"""Writes one weight file of a merged model: a copy of the base's, in which tensors are then replaced."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

from msgspec import Struct
from safetensors import safe_open
from torch import Tensor, uint8

from qlora_tui.catalog.model_validation import read_header
from qlora_tui.export.journal import Digest, Journal

_CHUNK = 1 << 22


class _Copied(Struct, frozen=True):
    """The journal's entry of a file that was copied whole."""

    size: int


def write_merged(
    base: Path, target: Path, changes: Mapping[str, Callable[[Tensor], Tensor]], journal: Journal
) -> None:
    """Write ``target`` as a safetensors file, one tensor in memory at a time.

    ``changes[name](tensor)`` returns the new tensor, of the same shape and dtype. What the journal knows
    to be complete is verified: tensors that change by their digests, others by comparison with ``base``.
    Raises OSError.
    """
    start, entries = read_header(base)
    offsets = {name: entries[name]["data_offsets"] for name in changes}
    if journal.get(target.name, _Copied) is None or not _is_copy(base, target, start, offsets.values()):
        journal.forget(target.name)
        shutil.copyfile(base, target)
        journal.record(target.name, _Copied(target.stat().st_size))
    with target.open("r+b") as file:
        for name, change in changes.items():
            begin, end = (start + offset for offset in offsets[name])
            entry = f"{target.name}/{name}"
            digest = journal.get(entry, Digest)
            file.seek(begin)
            if digest is not None and Digest.of_next(file, end - begin) == digest:
                continue
            with safe_open(base, framework="pt") as content:
                # Copy: the original is a view of the file.
                before = content.get_tensor(name).clone()
            after = change(before)
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
            data = after.contiguous().view(-1).view(uint8).numpy().data
            file.seek(begin)
            file.write(data)
            # Else the record could outlive what it describes.
            file.flush()
            journal.record(entry, Digest.of(data))


def _is_copy(base: Path, target: Path, start: int, changed: Iterable[tuple[int, int]]) -> bool:
    """Return whether two files are the same except in the places that change."""
    try:
        with base.open("rb") as first, target.open("rb") as second:
            place = 0
            for begin, end in sorted(changed):
                if not _is_same(first, second, place, start + begin):
                    return False
                place = start + end
            size = base.stat().st_size
            return target.stat().st_size == size and _is_same(first, second, place, size)
    except FileNotFoundError:
        return False


def _is_same(first: IO[bytes], second: IO[bytes], begin: int, end: int) -> bool:
    first.seek(begin)
    second.seek(begin)
    while begin < end:
        count = min(_CHUNK, end - begin)
        if first.read(count) != second.read(count):
            return False
        begin += count
    return True
