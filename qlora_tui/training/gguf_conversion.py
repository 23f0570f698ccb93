"""Converts a GGUF file once, in a separate process, with progress and a way to stop.

The separate process runs :func:`qlora_tui.training.gguf_weights.convert`. So the trainer, the chat and the
demo, which call these functions, never hold the memory of a conversion. torch is not imported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from qlora_tui import worker
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.local_models import ModelFiles, converted_dir, resolve_model
from qlora_tui.errors import UserError
from qlora_tui.files import private_dir
from qlora_tui.gpu.torch_env import OFFLINE
from qlora_tui.memory.levels import Conversion, peak_bytes
from qlora_tui.paths import cache_dir
from qlora_tui.publishing import delete_abandoned, draft_path, new_draft, publish
from qlora_tui.training.gguf_weights import ProgressCallback, write_description
from qlora_tui.worker import run_job


def convert_cached(
    file: Path,
    progress: ProgressCallback = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Return the folder of 16-bit safetensors for a GGUF file, converting the file if necessary.

    Raises:
        JobStopped: ``should_stop`` returned true; the partial conversion has been deleted.
        UserError: the file cannot be converted.
    """
    folder = folder_of(file)
    if not (folder / "config.json").exists():
        convert_in_child(file, folder, progress, should_stop)
    return folder


def model_folder(files: ModelFiles, progress: ProgressCallback = lambda done, total: None) -> Path:
    """Return the folder with a model's safetensors, converting a GGUF file first if that was not done yet.

    Raises UserError.
    """
    if files.gguf_file is None:
        return files.folder
    return convert_cached(files.folder / files.gguf_file, progress)


def cached_conversion(file: Path) -> Path | None:
    """Return the folder of an earlier conversion; None if there is none. Raises UserError."""
    folder = folder_of(file)
    return folder if (folder / "config.json").exists() else None


def tokenizer_folder(file: Path) -> Path:
    """Return a folder with config and tokenizer of a GGUF file, which are read from its header.

    The weights are not needed. Raises UserError for a file that cannot be a base.
    """
    converted = folder_of(file)
    folder = private_dir(cache_dir() / "gguf-tokenizers") / converted.name
    for known in (converted, folder):
        if (known / "config.json").exists():
            return known
    with new_draft(folder.parent) as draft:
        write_description(read_gguf(file, vocabulary=True), file, draft)
        publish(draft, folder)
    return folder


def pending_conversion(model_id: str) -> Conversion | None:
    """Return the conversion that a recipe's model needs before its first run.

    None if no conversion is needed, or if the model is not on this machine.
    """
    try:
        files = resolve_model(model_id)
        if files.gguf_file is None:
            return None
        file = files.folder / files.gguf_file
        if cached_conversion(file) is not None:
            return None
        return Conversion(file.name, _peak_bytes(file, file.stat().st_size))
    except (UserError, OSError):
        return None


@lru_cache(maxsize=4)
def _peak_bytes(file: Path, file_bytes: int) -> int:
    """Return the peak memory of a file's conversion, in bytes.

    The result is cached: the Memory screen calls this after each change, and reading a header takes time,
    because it can contain more than 100,000 tokens.
    """
    return peak_bytes(file_bytes=file_bytes, vocabulary=read_gguf(file).vocab_size or 0)


def convert_in_child(
    file: Path,
    folder: Path,
    progress: ProgressCallback = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write ``folder`` from ``file`` in a separate process. Raises UserError and JobStopped."""
    try:
        run_job(
            "qlora_tui.training.gguf_weights:convert",
            file,
            folder,
            result=type(None),
            title="The GGUF file could not be converted",
            subject=f"The process that converted {file}",
            on_progress=lambda message: progress(message.done, message.total),
            should_stop=should_stop,
            environ=worker.subprocess_env() | OFFLINE,
        )
    finally:
        with suppress(OSError, UserError):
            delete_abandoned(draft_path(folder))


def folder_of(file: Path) -> Path:
    """Return the folder for a file's conversion, whether or not it exists.

    A changed file gets another folder. Raises UserError if the file cannot be found.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError("GGUF file not found", what=f"{file}: {error.strerror}.") from error
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:20]
    return private_dir(converted_dir()) / f"{file.stem}-{key}"
