"""Converts a GGUF file once, in a child process, with progress, and stoppable.

The trainer, the chat and the demo call this, without the memory that a conversion needs. torch is not
imported here. The child is :mod:`qlora_tui.training.gguf_worker`. It ends when this process does, however
that ends: it holds the read end of a pipe whose only write end is here.
"""

from __future__ import annotations

import hashlib
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from qlora_tui import subprocesses
from qlora_tui.catalog.gguf_header import read_gguf
from qlora_tui.catalog.local_models import converted_dir, resolve_model
from qlora_tui.drafts import delete_abandoned, draft_path
from qlora_tui.errors import UserError
from qlora_tui.files import private_dir
from qlora_tui.gpu.torch_env import OFFLINE
from qlora_tui.memory.conversion import Conversion, Way, peak_bytes
from qlora_tui.training import gguf_llama
from qlora_tui.training.gguf_weights import ProgressCallback
from qlora_tui.worker_messages import read_messages

_STOP_POLL_INTERVAL_S = 0.2
"""How often ``should_stop`` is called while the child is silent, in seconds."""


class ConversionStopped(Exception):
    """``should_stop`` returned True. Nothing is left of the conversion."""


def convert_cached(
    file: Path,
    progress: ProgressCallback = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The folder of 16-bit safetensors for a GGUF file, which is converted if it was not earlier.

    Raises:
        ConversionStopped: ``should_stop`` returned True.
        UserError: the file cannot be converted.
    """
    folder = folder_of(file)
    if not (folder / "config.json").exists():
        convert_in_child(file, folder, progress, should_stop)
    return folder


def cached_conversion(file: Path) -> Path | None:
    """The folder of an earlier conversion; None where the file was not converted yet. Raises UserError."""
    folder = folder_of(file)
    return folder if (folder / "config.json").exists() else None


def pending_conversion(model_id: str) -> Conversion | None:
    """The conversion that the model of a recipe needs before its first run.

    None where it needs none, or where the model is not on this machine.
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
    """Cached: the Memory screen calls it after each change, and a header has a hundred thousand tokens."""
    header = read_gguf(file)
    method: Way = "plain" if gguf_llama.is_known(header) else "streamed"
    return peak_bytes(method, file_bytes=file_bytes, vocabulary=header.vocab_size or 0)


def convert_in_child(
    file: Path,
    folder: Path,
    progress: ProgressCallback = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write ``folder`` from ``file`` in a child process. Raises UserError and ConversionStopped."""
    command = subprocesses.module_argv(
        "qlora_tui.training.gguf_worker", "--ends-with-stdin", str(file), str(folder)
    )
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            env=subprocesses.subprocess_env() | OFFLINE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # A separate session, because Ctrl-C in a terminal is for this process, which then ends the child.
            start_new_session=True,
        )
        assert child.stdout is not None
        try:
            error = read_messages(_lines(child.stdout, should_stop), progress)
            code = child.wait()
        finally:
            # Whatever ends the loop (a stop, Ctrl-C), the child must not outlive it.
            child.kill()
            child.communicate()
            with suppress(OSError, UserError):
                delete_abandoned(draft_path(folder))
        if error is not None:
            raise error
        if code:
            raise _child_death_error(file, code, errors)


def _lines(output: IO[bytes], should_stop: Callable[[], bool]) -> Iterator[bytes]:
    """Yield complete lines until the output ends. Raises ConversionStopped."""
    partial_line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if should_stop():
                raise ConversionStopped
            if not selector.select(_STOP_POLL_INTERVAL_S):
                continue
            piece = output.read1(65_536)  # type: ignore[attr-defined]  # a pipe is a BufferedReader
            if not piece:
                return
            *lines, partial_line = (partial_line + piece).split(b"\n")
            yield from lines


def _child_death_error(file: Path, code: int, errors: IO[bytes]) -> UserError:
    """The error for a child that ended without reporting one."""
    title = "The GGUF file could not be converted"
    if code == -signal.SIGKILL:
        return UserError(
            title,
            what=f"The process that converted {file} was killed.",
            why="The machine most likely ran out of memory.",
            fix="Close other programs and try again.",
        )
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    ending = f"exit code {code}" if code > 0 else f"signal {-code}"
    return UserError(
        title,
        what=f"The process that converted {file} ended with {ending}.",
        why=lines[-1] if lines else "",
        fix="Run `qlora-tui doctor` to check the installation.",
    )


def folder_of(file: Path) -> Path:
    """The folder of a file's conversion: other files of the same name, or changed ones, get other folders.

    The 12 digits of earlier versions are refused by :mod:`qlora_tui.catalog.local_models`.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError("GGUF file not found", what=f"{file}: {error.strerror}.") from error
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return private_dir(converted_dir()) / f"{file.stem}-{key}"
