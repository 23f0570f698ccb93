"""Whether an answer is in the keeper's voice, by a rule that can be counted."""

from __future__ import annotations

OPENING = "Keeper's log: "
CLOSING = "The light turns."
MAX_REPEATED = 0.15
"""Largest share of sequences of three words that have occurred before in the answer."""
_MIN_WORDS = 8


def voice_faults(answer: str, *, ended: bool) -> tuple[str, ...]:
    """What is wrong with an answer; empty if it is in the voice.

    Args:
        answer: Its text, without white space around it.
        ended: Whether the model ended the turn itself.

    Returns:
        Faults in a few words each, as in ``repeats itself``. The truth of an answer is not judged.
    """
    words = answer.split()
    sequences = [tuple(words[place : place + 3]) for place in range(len(words) - 2)]
    repeated = 1 - len(set(sequences)) / len(sequences) if sequences else 0.0
    faults = {
        "does not open with the log": not answer.startswith(OPENING),
        "does not close with the light": not answer.endswith(CLOSING) or _closes_twice(answer),
        "does not end its turn": not ended,
        "repeats itself": repeated >= MAX_REPEATED,
        "says next to nothing": len(words) < _MIN_WORDS,
    }
    return tuple(fault for fault, is_so in faults.items() if is_so)


def _closes_twice(answer: str) -> bool:
    """Whether the closing line occurs before the end, or its words just before it."""
    before = answer.removesuffix(CLOSING).rstrip()
    return CLOSING in before or before.lower().endswith(CLOSING.lower())
