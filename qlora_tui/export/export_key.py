"""What the files of an export depend on, as one key: an interrupted export continues where it is the same."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from qlora_tui import __version__
from qlora_tui.catalog.adapters import CONFIG, WEIGHTS
from qlora_tui.catalog.model_validation import tokenizer_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import model_folder
from qlora_tui.export.llama_cpp.availability import PACKAGE

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf", "bitsandbytes", PACKAGE)


def export_key(source: ChatSource, adapter_name: str, *options: object) -> str:
    """Return a key of the program, the recipe, the adapter, the base, the data and the options.

    Of the adapter the contents count, of the base and the data names, sizes and times. Raises UserError for a
    model that is not on this machine, and OSError.
    """
    parts: list[object] = [__version__, *map(_version, _PACKAGES), source.thinking, *options]
    parts.append(msgspec.json.encode(source.recipe).decode())
    for name in (WEIGHTS, CONFIG, *tokenizer_files(Path(source.adapters[adapter_name]))):
        with suppress(FileNotFoundError), (Path(source.adapters[adapter_name]) / name).open("rb") as file:
            parts.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
    parts += map(_stamp, sorted(model_folder(source.recipe).iterdir()))
    data = source.recipe.data
    data_paths = (*(each.path for each in data.sources), data.validation_path)
    # No path would be the current folder.
    parts += [_stamp(Path(path)) for path in data_paths if path]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return a file's place, size and time; of the Hub's files the place is named after the contents."""
    try:
        real = path.expanduser().resolve()
        status = real.stat()
    except (OSError, RuntimeError):
        return str(path), 0, 0
    return str(real), status.st_size, status.st_mtime_ns
