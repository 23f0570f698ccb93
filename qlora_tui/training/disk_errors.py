"""Recovers the OSError behind a failed write of torch or safetensors.

torch writes files in C++ and reports a failed write as an unexpected position; safetensors writes in Rust and
has the error number in its message. Both become the OSError that caused them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_RUST = re.compile(r"\(os error (\d+)\)")
BUFFER_BYTES = 1 << 20


def disk_error(error: BaseException) -> OSError | None:
    """The OSError that caused an exception while saving; None where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        in_rust = _RUST.search(str(seen))
        if in_rust:
            return OSError(int(in_rust[1]), os.strerror(int(in_rust[1])))
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def true_disk_errors() -> Iterator[None]:
    """Raise OSError, with its error number, for a failed write of torch or safetensors inside."""
    import torch

    save = torch.save

    def save_through_python(value: object, file: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(file, str | os.PathLike):
            save(value, file, *arguments, **options)
            return
        # With a file object, torch keeps the exception of its write as the context of its own exception.
        with _Unbuffered(Path(file)) as raw, io.BufferedWriter(raw, BUFFER_BYTES) as written:
            save(value, written, *arguments, **options)

    torch.save = save_through_python  # type: ignore[assignment]  # it takes the same arguments
    try:
        yield
    except Exception as error:
        behind = disk_error(error)
        if behind is None or behind is error:
            raise
        raise behind from error
    finally:
        torch.save = save


class _Unbuffered(io.RawIOBase):
    """A new file without a buffer: each write is one system call."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def writable(self) -> bool:
        return True

    def write(self, content: ReadableBuffer, /) -> int:
        return os.write(self._handle, content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()
