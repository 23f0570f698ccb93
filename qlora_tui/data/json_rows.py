"""Reads rows from a .json file, which is loaded as a whole only if it is one object.

The file is an array of rows, consecutive rows, or one object that holds the rows under a key or as a list for
each column. Reading ends at a syntax error, because the start of the next row is then unknown.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from qlora_tui.data.chat_formats import turn_keys
from qlora_tui.data.row import DEEPEST, MAX_VALUES, Row, is_too_deep
from qlora_tui.data.text_reader import BOM, NUL_BYTES, BrokenFileError, Stream

_LARGEST_ROW_CHARACTERS = 64 << 20
"""Number of characters after which an unfinished value counts as broken instead of long."""
_HOLDERS = ("data", "train", "rows", "examples", "conversations", "items", "samples", "instances")
"""Keys under which a whole data set is stored in one object."""
_BLANK = " \t\r\n" + BOM


def json_rows(stream: Stream) -> Iterator[Row]:
    """Yield the rows of an array, of consecutive values (as in JSONL), or of one object that holds all rows.

    Raises ``BrokenFileError`` at the first syntax error.
    """
    if b"\x00" in stream.peek()[:4]:
        raise BrokenFileError("bad-encoding", 1, NUL_BYTES)
    values = _Values(stream)
    number = 0
    for value in values:
        if number == 0 and values.top_level and isinstance(value, dict) and values.at_end():
            held = _held_rows(value)
            if held is not None:
                others = [name for name, rows in value.items() if rows is not held and _is_set_of_rows(rows)]
                note = f"not read: the rows under {', '.join(map(repr, others))}" if others else ""
                for number, row in enumerate(held, 1):
                    first = _row(number, row)
                    if number == 1:
                        first = replace(first, file_note=note, warnings=repeated_key_warning(values.repeated))
                    yield first
                return
        number += 1
        yield _row(number, value, values)


def without_repeats(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    """Return an object of these pairs, and add keys that occur twice to ``repeated``."""
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated.extend(key for number, key in enumerate(keys) if key in keys[:number])
    return decoded


def repeated_key_warning(repeated: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the warning about duplicate keys within an object of a row; empty if there are none."""
    if not repeated:
        return ()
    return (
        (
            "repeated-key",
            f"The key {repeated[0]!r} appears twice in one object; only the last value is read.",
        ),
    )


def _row(number: int, value: Any, values: _Values | None = None) -> Row:
    """Return a row. ``values``: the reader that knows the row's line number; None if the whole file is one
    object.
    """
    if not has_lone_surrogate(value):
        return Row(
            number=number, value=value, warnings=repeated_key_warning(values.repeated if values else ())
        )
    place = values.undecodable_byte() if values is not None else ""
    what = (
        place
        or f"Row {number} contains an unpaired surrogate (half a character), or a byte that is not UTF-8"
    )
    return Row(number=number, kind="bad-encoding", error=f"{what}.")


def has_lone_surrogate(value: Any) -> bool:
    """Return whether a decoded value holds half of a surrogate pair, which is valid JSON but not text."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, list):
        return any(map(has_lone_surrogate, value))
    if isinstance(value, dict):
        return any(has_lone_surrogate(k) or has_lone_surrogate(v) for k, v in value.items())
    return False


def _held_rows(value: dict[str, Any]) -> list[Any] | None:
    """Return the rows inside a whole-file object, or None if the object is itself a row.

    Raises ``BrokenFileError`` if the object holds two sets of rows and neither is named as the training set.
    """
    sets = [name for name in _HOLDERS if _is_set_of_rows(value.get(name))]
    if len(sets) > 1 and "train" not in sets:
        what = f"rows under {sets[0]!r} and under {sets[1]!r}: keep one of them"
        raise BrokenFileError("bad-row", 1, what)
    if sets:
        held: list[Any] = value["train" if "train" in sets else sets[0]]
        return held
    columns = {k: v for k, v in value.items() if isinstance(v, list)}
    is_table = len(columns) == len(value) >= 2 and len({len(v) for v in columns.values()}) == 1
    if is_table and not any(map(turn_keys, columns.values())):  # otherwise one conversation with its tools
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return None


def _is_set_of_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value[:10]):
        return False
    return not any("role" in v or "from" in v for v in value[:10])  # otherwise the turns of one conversation


class _Values:
    """Consecutive JSON values, decoded while the text is read."""

    def __init__(self, stream: Stream):
        self._chunks = stream.chunks()
        # A byte that is not UTF-8 becomes half of a surrogate pair, so that later values can be read.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.repeated: list[str] = []
        """Keys that occur twice in an object of the last value."""
        self._decode = json.JSONDecoder(
            object_pairs_hook=lambda pairs: without_repeats(pairs, self.repeated)
        ).raw_decode
        self._text = ""
        self._at = 0
        self._value_at = 0
        self._line = 1
        self._ended = False
        self.top_level = True
        """Whether the values are outside an array."""

    def at_end(self) -> bool:
        """Return whether only white space follows."""
        return self._next_character() == ""

    def __iter__(self) -> Iterator[Any]:
        if self._next_character() == "[":
            yield from self._array()
            return
        while self._next_character():
            yield self._value()
            if self._next_character() == ",":
                self._at += 1

    def _array(self) -> Iterator[Any]:
        self.top_level = False
        self._at += 1
        if self._next_character() == "]":
            return
        while True:
            yield self._value()
            mark = self._next_character()
            self._at += 1
            if mark == ",":
                if self._next_character() == "]":
                    raise self._broken(self._at, "a comma before the closing bracket")
                continue
            if mark == "]":
                if self._next_character():
                    raise self._broken(self._at, "the array of rows has ended, and more follows")
                return
            what = f"expected a comma or ], found {mark!r}" if mark else "the file ends inside the array"
            raise self._broken(self._at - 1, what)

    def _value(self) -> Any:
        while True:
            self.repeated.clear()
            try:
                value, end = self._decode(self._text, self._at)
            except RecursionError:
                raise self._broken(self._at, "nested too deeply") from None
            except ValueError as error:
                reason, position = _reason(error, self._at)
                self._need_more(reason, position)
                continue
            if end == len(self._text) and not isinstance(value, dict | list) and self._more():
                continue
            opened = self._text.count("[", self._at, end) + self._text.count("{", self._at, end)
            self._value_at, self._at = self._at, end
            if opened > DEEPEST and is_too_deep(value):
                raise self._broken(self._at, "nested too deeply")
            return value

    def _need_more(self, reason: str, position: int) -> None:
        """Read more if the value may only be incomplete so far; otherwise raise an error."""
        held, inside = len(self._text) - self._at, position - self._at
        cut_off = position >= len(self._text) - 16 or reason.startswith("Unterminated string")
        if held > _LARGEST_ROW_CHARACTERS or not cut_off or not self._more(held):
            raise self._broken(self._at + min(inside, held), reason)
        if sum(map(self._text.count, ",[{")) > MAX_VALUES:
            raise self._broken(self._at, f"a value contains more than {MAX_VALUES:,} others")

    def _next_character(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self, at_least: int = 1) -> bool:
        """Append at least ``at_least`` characters if there are that many, and drop consumed ones."""
        if self._ended:
            return False
        self._line += self._text.count("\n", 0, self._at)
        parts = [self._text[self._at :]]
        added = 0
        while added < at_least and not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            piece = self._utf8.decode(chunk, final=not chunk)
            added += len(piece)
            parts.append(piece)
        self._text = "".join(parts)
        self._at = 0
        return added > 0

    def undecodable_byte(self) -> str:
        """Return line and value of the last value's first byte that is not UTF-8; empty if there is none."""
        for position in range(self._value_at, self._at):
            if "\udc80" <= (half := self._text[position]) <= "\udcff":
                return f"Line {self._line_at(position)}: byte 0x{ord(half) - 0xDC00:02x} is not UTF-8"
        return ""

    def _broken(self, position: int, reason: str) -> BrokenFileError:
        return BrokenFileError("bad-json", self._line_at(position), reason)

    def _line_at(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)


def _reason(error: ValueError, at: int) -> tuple[str, int]:
    if isinstance(error, json.JSONDecodeError):
        return error.msg, error.pos
    return str(error), at
