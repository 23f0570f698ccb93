"""Whole files, damaged: bytes changed, cut, repeated, fragments that parsers stumble over, wrong types."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

FRAGMENTS = (
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\x1b]52;c;x\x07",
    b'"',
    b"'",
    b"\\",
    b"\\ud800",
    b"{",
    b"}",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"a=" + b"[" * 3000,
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"9" * 5000,
    b"true",
    b"\n",
    b"\r",
    b"=",
    b"{%",
    b"{{",
    b"{% for a in range(99999) %}",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
)
WRONG_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**400, 1e400, "", "x", "(a+)+$", [], ["x"], [[]], {}, {"x": 1}, {"x": []},
)  # fmt: skip
"""One of each type, and what each type has at its edges."""
_MAX_CHILDREN = 40
_EDIT = st.tuples(
    st.sampled_from(("insert", "replace", "delete", "repeat", "cut", "flip")),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(FRAGMENTS) | st.binary(min_size=1, max_size=4),
)


def damaged(whole: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of ``whole`` after one to four edits, or a few bytes of no kind."""
    edited = st.builds(_edited, st.sampled_from(list(whole)), st.lists(_EDIT, min_size=1, max_size=4))
    return edited | st.binary(max_size=64)


def _edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    data: Any = bytearray(content)
    for kind, share, piece in edits:
        at, size = int(share * len(data)), len(piece)
        match kind:
            case "insert":
                data[at:at] = piece
            case "replace":
                data[at : at + size] = piece
            case "delete":
                del data[at : at + size]
            case "repeat":
                data[at:at] = data[at : at + 40] * 3
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= piece[0] or 1
    return bytes(data)


def mistyped(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A JSON document with each value in turn replaced by each wrong one; which value, and the document.

    Of a list its first entry is replaced, and of an object with many keys the first ones.
    """
    document = json.loads(content)
    for path in _paths(document):
        for value in WRONG_VALUES:
            changed = copy.deepcopy(document)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            yield f"{'.'.join(map(str, path))} = {str(value)[:40]}", json.dumps(changed).encode()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    keys: Sequence[Any] = ()
    if isinstance(value, dict):
        keys = list(value)[:_MAX_CHILDREN]
    elif isinstance(value, list):
        keys = range(min(len(value), 1))
    for key in keys:
        yield from _paths(value[key], (*path, key))
