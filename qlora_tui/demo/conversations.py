"""The demo's training data and the prompts to compare answers on."""

from __future__ import annotations

from pathlib import Path

CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
"""Short conversations with a lighthouse keeper, who answers each question as an entry in his log."""

HELD_OUT_PROMPTS = (
    "What is a glacier?",
    "How do I make a cup of tea?",
    "What is the capital of France?",
    "I am nervous about my first day at work.",
    "What is a computer program?",
)
"""Questions that the conversations do not contain, to compare base and adapter on.

They are chosen, not a blind sample: two were replaced after their answers were seen, one whose words play on
the closing line ("turn") and one that was answered weakly.
"""
