"""Notices that an answer repeats itself, as small or overtrained models do."""

from __future__ import annotations

_MAX_BLOCK_WORDS = 60
_MAX_CHARACTERS = 4000
"""How much of the end of a text is looked at."""
_LEAST_REPEATS = 3
_REPEATS_OF_SHORT_BLOCKS = {1: 10, 2: 5}
"""Times that one or two words must follow each other, since ``no, no, no`` is no loop."""
_SENTENCE_ENDS = (".", "!", "?", "…")
_MARKS = ".,;:!?…\"'“”‘’()[]*_"
_FENCE = "```"
_TABLE = "|"


def find_loop(text: str) -> str:
    """Return what the end of ``text`` repeats, or an empty text.

    That is a sentence, or any three words or more, three times in a row. Fewer words must come more often.
    Code and tables may repeat themselves.
    """
    if text.count(_FENCE) % 2:
        return ""
    end = text[-_MAX_CHARACTERS:].split()
    words = [word.strip(_MARKS).casefold() for word in end]
    for length in range(1, min(_MAX_BLOCK_WORDS, len(words) // _LEAST_REPEATS) + 1):
        block = words[-length:]
        if words[-2 * length : -length] != block:
            continue
        repeats = _REPEATS_OF_SHORT_BLOCKS.get(length, _LEAST_REPEATS)
        if length > 1 and end[-1].endswith(_SENTENCE_ENDS):
            repeats = _LEAST_REPEATS
        if len(words) >= repeats * length and words[-repeats * length :] == block * repeats:
            phrase = " ".join(end[-length:])
            if any(character.isalpha() for character in phrase) and _TABLE not in phrase:
                return phrase
    return ""
