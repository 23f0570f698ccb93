"""The demo's training data, its held-out questions, and a check whether an answer is in the trained voice."""

from __future__ import annotations

from pathlib import Path

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
"""Short conversations with a lighthouse keeper, who writes each answer as an entry in his log."""

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
"""Conversations that are not in the training data: 20 questions, five of which follow an answer.

They ask for advice and explanations. Facts and sums are avoided, because a model of this size does not know
them, with or without the adapter.
"""
SHOWN = 4
"""Number of conversations, from the first, whose answers are shown next to those of the base."""


OPENING = "Keeper's log: "
CLOSING = "The light turns."
MAX_REPEATED = 0.15
"""Maximum acceptable share of three-word sequences that repeat earlier ones in the answer."""
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
    """Return whether the closing line occurs before the end of the answer, or its words occur directly before
    the closing line.
    """
    before = answer.removesuffix(CLOSING).rstrip()
    return CLOSING in before or before.lower().endswith(CLOSING.lower())
