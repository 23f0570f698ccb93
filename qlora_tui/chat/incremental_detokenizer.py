"""Token ids to text as they come, never giving out half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""
_LONGEST_CHARACTER = 4
"""Bytes in UTF-8, so tokens at most until a character is whole."""


class IncrementalDetokenizer:
    """Feed it ids one by one; what it returns, joined, is the text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode`` gives the text of ids, special tokens left out."""
        self._decode = decode
        self._ids: list[int] = []
        # The piece given out last is decoded again in front of the next: many decoders treat the beginning
        # of a text differently.
        self._context = 0
        self._given = 0

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before; often a word, empty within a character."""
        self._ids.append(token_id)
        piece = self._pending_text()
        unfinished = piece.endswith(_BROKEN) and len(self._ids) - self._given < _LONGEST_CHARACTER
        return "" if unfinished else self._give(piece)

    def rest(self) -> str:
        """What was held back, when no more ids come."""
        return self._give(self._pending_text())

    def _pending_text(self) -> str:
        before = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _give(self, piece: str) -> str:
        if piece:
            self._context, self._given = self._given, len(self._ids)
        return piece
