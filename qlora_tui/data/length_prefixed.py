"""Bytes through a pipe, each piece under its length. Used by ``workers`` and ``worker``."""

from __future__ import annotations

from typing import IO

_LENGTH_BYTES = 8


def write_frame(pipe: IO[bytes], content: bytes) -> None:
    """One piece. Raises ``OSError`` where nobody reads."""
    pipe.write(len(content).to_bytes(_LENGTH_BYTES, "little"))
    pipe.write(content)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes:
    """The next piece. Raises ``EOFError`` at the end, or in the middle of a piece."""
    length = int.from_bytes(_exactly(pipe, _LENGTH_BYTES), "little")
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    content = pipe.read(count)
    if len(content) < count:
        raise EOFError
    return content
