"""The demo's training data, its held-out questions, and a check for the trained voice in an answer."""

from __future__ import annotations

from pathlib import Path

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
"""File of short conversations with a lighthouse keeper, who writes each answer as an entry in his log."""

HELD_OUT: tuple[tuple[str, ...], ...] = (
    ("What is a glacier?",),
    ("How do I sharpen a pencil?",),
    ("I am nervous about my first day at work.", "What should I say to my new boss?"),
    ("What is friendship?",),
    ("Tell me about your night.", "Did anything frighten you?"),
    ("How do I make a cup of tea?", "And how do I keep it warm?"),
    ("What is a computer program?",),
    ("How do I plant a tomato?",),
    ("Why is the sea salty?", "Is it the same everywhere?"),
    ("I cannot decide what to do this weekend.",),
    ("How do I fold a paper boat?",),
    ("What is a shadow?",),
    ("My cat has run away.", "What should I do first?"),
    ("How do I learn to whistle?",),
    ("What makes a good story?",),
)
"""Conversations that are not in the training data: 20 questions, five of which are follow-up questions.

They ask for advice and explanations. Facts and arithmetic are avoided, because the demo's small model gets
them wrong, with or without the adapter.
"""
SHOWN = 4
"""Number of conversations that the base is asked too, beginning with the first. Its answers are shown next to
the adapter's.
"""


OPENING = "Keeper's log: "
CLOSING = "The light turns."
MAX_REPEATED = 0.15
"""Share of repeated three-word sequences at which an answer counts as repeating itself."""
_MIN_WORDS = 8


def voice_faults(answer: str, *, ended: bool) -> tuple[str, ...]:
    """Return what is wrong with an answer; empty if it is in the trained voice.

    Args:
        answer: Text of the answer, without white space around it.
        ended: Whether the model ended the turn itself.

    Returns:
        Faults in a few words each, such as ``repeats itself``. The truth of an answer is not judged.
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
    """Return whether the closing line also occurs earlier in the answer. Directly before the closing line at
    the end, capitalization is ignored.
    """
    before = answer.removesuffix(CLOSING).rstrip()
    return CLOSING in before or before.lower().endswith(CLOSING.lower())
