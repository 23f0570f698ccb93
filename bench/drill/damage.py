"""Random changes of a file's bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

MAX_CHANGES = 4
_INSERTED = (
    b"\xff\xfe\x80",
    b"\x00" * 16,
    b"\x1b]52;c;QQ==\x07\x1b[2J\xc2\x9b2J\xe2\x80\xae",
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b"9" * 400,
    b"-1e999",
    b"NaN",
    b"\\ud800",
    b'"' * 3,
    b"\r\n" * 100,
    b"\xef\xbb\xbf",
    b"2147483648",
    b"18446744073709551616",
)


def damaged(content: bytes, luck: random.Random) -> bytes:
    """The content with one to :data:`MAX_CHANGES` random changes."""
    for _ in range(luck.randint(1, MAX_CHANGES)):
        content = luck.choice(_CHANGES)(content, luck)
    return content


def _flip(content: bytes, luck: random.Random) -> bytes:
    if not content:
        return b"\x01"
    at = luck.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << luck.randrange(8))]) + content[at + 1 :]


def _overwrite(content: bytes, luck: random.Random) -> bytes:
    at = luck.randrange(len(content) + 1)
    size = luck.choice((1, 2, 4, 8, 64))
    return content[:at] + luck.randbytes(size) + content[at + size :]


def _cut(content: bytes, luck: random.Random) -> bytes:
    return content[: luck.randrange(len(content) + 1)]


def _remove(content: bytes, luck: random.Random) -> bytes:
    at = luck.randrange(len(content) + 1)
    return content[:at] + content[at + luck.randint(1, 64) :]


def _repeat(content: bytes, luck: random.Random) -> bytes:
    at = luck.randrange(len(content) + 1)
    return content[:at] + content[at : at + luck.randint(1, 256)] * luck.randint(2, 20) + content[at:]


def _insert(content: bytes, luck: random.Random) -> bytes:
    at = luck.randrange(len(content) + 1)
    return content[:at] + luck.choice(_INSERTED) + content[at:]


def _extreme(content: bytes, luck: random.Random) -> bytes:
    """A length field with all bits set, or none."""
    at = luck.randrange(len(content) + 1)
    return content[:at] + luck.choice((b"\xff", b"\x00", b"\x7f")) * 8 + content[at + 8 :]


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _overwrite, _cut, _remove, _repeat, _insert, _extreme),
)
