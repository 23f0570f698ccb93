"""The demo's training data, and the held-out questions that its adapter is asked."""

from __future__ import annotations

from pathlib import Path

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
"""Short conversations with a lighthouse keeper, who answers each question as an entry in his log."""

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
"""Conversations that are not in the data: 20 questions, five of them asked after an answer.

They ask for advice and explanations. Facts and sums are left out: a model of this size does not know them,
with or without the adapter.
"""
SHOWN = 4
"""Number of conversations, from the first, whose answers are shown beside the base model's."""
