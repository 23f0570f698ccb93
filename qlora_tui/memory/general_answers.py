"""Memory of the answers to general prompts, for the forgetting curve: computed between two steps.

The answers are computed together, without gradients, so what counts beside the model are the keys and values
of all of them. Comparing with the answers takes less than a step of the same tokens.
"""

from __future__ import annotations

from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.step import Peak

ANSWER_TOKENS = 48
"""Most tokens of an answer."""
PROMPT_TOKENS = 64
"""Tokens that the longest general prompt takes at most, with what most chat templates put around it."""


def answers_moment(layout: Layout, execution: ExecutionConfig) -> Peak:
    """Return the moment when all general prompts are being answered, beyond the static memory."""
    tokens = execution.general_prompts * (PROMPT_TOKENS + ANSWER_TOKENS)
    widths = (b.heads.kv_heads * (b.heads.head_dim + b.heads.value_dim) for b in layout.blocks)
    return Peak("answers to general prompts", {"kv_cache": tokens * sum(widths) * execution.compute_itemsize})
