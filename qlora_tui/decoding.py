"""Decoding of JSON that may be damaged, truncated or written by another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from qlora_tui.files import read_regular

T = TypeVar("T")

UnixTime: TypeAlias = Annotated[float, Meta(ge=-62_135_596_800, le=253_402_300_799)]
"""Seconds since 1970, within the years 1 to 9999, because calendar functions fail outside this range."""
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
"""A count, or a number of bytes, that fits a 64-bit integer and converts to a float."""


def decode_json(content: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode JSON. Raises msgspec.DecodeError for anything that cannot be decoded.

    msgspec itself raises UnicodeDecodeError for bytes that are not UTF-8 and RecursionError for deep nesting.
    Neither is a DecodeError.
    """
    try:
        return decoder.decode(content)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"byte {error.start} of a text is not UTF-8") from None
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None


def try_json(content: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    """Decode JSON; return None for anything that cannot be decoded."""
    try:
        return decode_json(content, decoder)
    except msgspec.MsgspecError:
        return None


def read_json(path: Path, decoder: msgspec.json.Decoder[T], max_bytes: int = 1 << 24) -> T | None:
    """Decode a file; return None if it is missing, unreadable, damaged, or longer than ``max_bytes``."""
    try:
        return decode_json(read_regular(path, max_bytes), decoder)
    except (OSError, msgspec.MsgspecError):
        return None
