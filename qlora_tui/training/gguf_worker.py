"""The job that converts a GGUF file to a folder of 16-bit safetensors.

:mod:`qlora_tui.training.gguf_conversion` starts it, so that the memory of the conversion is released with the
process. transformers can dequantize a GGUF file but not quantize it to NF4 at the same time, so the weights
are written to disk in between.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_tui.drafts import draft_path, held_draft, publish
from qlora_tui.errors import UserError, first_line
from qlora_tui.training.failures import is_full_disk, is_out_of_memory
from qlora_tui.training.gguf_weights import write_model
from qlora_tui.worker import Report


def convert(file: Path, folder: Path, report: Report = lambda done, total, text="": None) -> None:
    """Write ``folder`` completely or not at all. Raises UserError.

    Waits for another process that is converting the same file, and then does nothing.
    """
    from safetensors import SafetensorError  # no OSError, also where the disk is full

    with _conversion_lock(folder):
        if (folder / "config.json").exists():
            return
        try:
            with held_draft(draft_path(folder)) as draft:
                # Only who holds the lock writes it.
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
    """Hold the lock file beside ``folder``; the kernel releases it however this process ends."""
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
