"""The header of a safetensors file: names, shapes and offsets of its tensors, without torch or safetensors.

Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_tui.foreign_files import open_foreign

MAX_HEADER_BYTES = 16 << 20
"""Most bytes of a header: some 130,000 tensors. The library allows 100 MB, which parses to gigabytes."""


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the start of the data, and each tensor's entry: dtype, shape, ``data_offsets`` from there.

    Raises OSError where the file cannot be read, and ValueError where its header is damaged or too large.
    """
    with open_foreign(file) as content:
        size = int.from_bytes(content.read(8), "little")
        if 8 + size > file.stat().st_size:
            raise ValueError("it is not as long as its header says")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        try:
            entries = json.loads(content.read(size))
        except (ValueError, RecursionError):
            raise ValueError("its header is not JSON") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("its header is not a JSON object of tensors")
    return 8 + size, entries


def safetensors_damage(file: Path) -> str | None:
    """Return why a file is damaged, by its header and its length; None where it is not.

    Raises OSError where the file cannot be read.
    """
    size_bytes = file.stat().st_size
    try:
        start, entries = read_header(file)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        if start + max(ends, default=0) == size_bytes:
            return None
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError, IndexError):
        return "its header does not say where its tensors are"
    return "it is not as long as its header says"
