"""Reasoning in a rendered conversation: its tags and its place. Used by ``assistant_spans``."""

from __future__ import annotations

import re

from qlora_tui.data.thinking import OPENED

THINK = ("<think>\n", "\n</think>\n\n")
"""Text that most models write before and after their reasoning."""
_GEMMA = ("<|channel>thought\n", "\n<channel|>")
TAGS = re.compile("</?think>")
_ENDS = re.compile(r"\s*(?:</think>|<channel\|>|<\|end\|>|<\|eom\|>|\[/THINK\])\s*")
"""Text between reasoning and answer: Qwen, GLM and DeepSeek; Gemma 4; gpt-oss; Muse; Mistral."""


def after_thought(text: str, end: int) -> int:
    """Return where the answer begins after reasoning that ends at ``end``, in characters of ``text``."""
    match = _ENDS.match(text, end)
    return match.end() if match else end


def tags_of(literals: str) -> tuple[str, str]:
    """Return the tags around reasoning for a template that writes ``literals``."""
    return _GEMMA if "<channel|>" in literals else THINK


def answered(prompt: str, reasoning: str, rest: str, tags: tuple[str, str] = THINK) -> str:
    """Join a prompt, the reasoning that follows it, and ``rest``, which is the answer and its end.

    The tags are on separate lines, unless the prompt opens the thought without a line end, as in
    DeepSeek-V3.1.
    """
    opened = OPENED.search(prompt)
    # White space after reasoning comes from the file; before an answer without any, from the answer.
    answer = re.sub(r"\A\s*</think>\s*", "", rest.lstrip() if reasoning else rest)
    if opened and not opened[1]:
        return f"{prompt}{reasoning}</think>{answer}"
    opening, closing = tags
    return f"{prompt}{'' if opened else opening}{reasoning}{closing}{answer}"
