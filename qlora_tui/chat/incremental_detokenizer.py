"""Incremental decoding of token ids to text, without incomplete characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""Character that a decoder writes for bytes that are not a complete character (yet)."""
_LONGEST_CHARACTER = 4
"""Most bytes of a UTF-8 character, so most tokens until a character is complete."""


class IncrementalDetokenizer:
    """Decodes ids one at a time; the returned texts, joined, are the full text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode`` returns the text of ids without special tokens."""
        self._decode = decode
        self._ids: list[int] = []
        # The previous piece is decoded again before the next: many decoders treat the beginning
        # of a text differently.
        self._context = 0
        self._given = 0

    def add(self, token_id: int) -> str:
        """Return the text completed by this id; often a word, empty within a character."""
        self._ids.append(token_id)
        piece = self._pending_text()
        unfinished = piece.endswith(_BROKEN) and len(self._ids) - self._given < _LONGEST_CHARACTER
        return "" if unfinished else self._give(piece)

    def rest(self) -> str:
        """Return the text still held back after the last id."""
        return self._give(self._pending_text())

    def _pending_text(self) -> str:
        before = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _give(self, piece: str) -> str:
        if piece:
            self._context, self._given = self._given, len(self._ids)
        return piece
