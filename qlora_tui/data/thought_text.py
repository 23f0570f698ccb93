"""Reasoning in a rendered conversation: what ends it, and how it follows a prompt. Used by ``spans``."""

from __future__ import annotations

import re

from qlora_tui.data.thinking import OPENED

THINK = ("<think>\n", "\n</think>\n\n")
"""What most models write before and after their reasoning."""
_GEMMA = ("<|channel>thought\n", "\n<channel|>")
TAGS = re.compile("</?think>")
_ENDS = re.compile(r"\s*(?:</think>|<channel\|>|<\|end\|>|<\|eom\|>|\[/THINK\])\s*")
"""What stands between reasoning and answer: of Qwen, GLM and DeepSeek; Gemma 4; gpt-oss; Muse; Mistral."""


def after_thought(text: str, end: int) -> int:
    """Where the answer begins after reasoning that ends at ``end``, in characters of ``text``."""
    match = _ENDS.match(text, end)
    return match.end() if match else end


def tags_of(literals: str) -> tuple[str, str]:
    """What stands around reasoning in texts of a template that writes ``literals``."""
    return _GEMMA if "<channel|>" in literals else THINK


def answered(prompt: str, reasoning: str, rest: str, tags: tuple[str, str] = THINK) -> str:
    """A prompt, the reasoning that follows it, and ``rest``, which is the answer and its end.

    The tags stand on lines of their own, but where the prompt has opened the thought without a line end, as
    DeepSeek-V3.1's does.
    """
    opened = OPENED.search(prompt)
    # White space after reasoning is the file's; before an answer without any it is the answer's own.
    answer = re.sub(r"\A\s*</think>\s*", "", rest.lstrip() if reasoning else rest)
    if opened and not opened[1]:
        return f"{prompt}{reasoning}</think>{answer}"
    opening, closing = tags
    return f"{prompt}{'' if opened else opening}{reasoning}{closing}{answer}"
