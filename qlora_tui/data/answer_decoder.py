"""Text of a model's answers, with thoughts separated from what it says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from qlora_tui.data.thinking import OPENED
from qlora_tui.data.thought_splitter import ThoughtSplitter, marks_in_template
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tokenizer_guard import panics_as_errors

_OPENING_TOKENS = 8
"""Tokens of a prompt's end that are checked for an opened thought."""


class AnswerDecoder:
    """Decodes answers of models with one tokenizer and chat template."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._marks = marks_in_template(tokenizer.template.literals)
        self._mark_ids = frozenset(
            token_id
            for token_id in tokenizer.special_ids
            if any((tokenizer.backend.id_to_token(token_id) or "\0") in mark.text for mark in self._marks)
        )

    def splitter(self, prompt: Sequence[int]) -> ThoughtSplitter:
        """Return what separates thoughts from the answer to ``prompt``, which may have opened one."""
        opened = bool(OPENED.search(self._tokenizer.decode(prompt[-_OPENING_TOKENS:])))
        return ThoughtSplitter(self._marks, in_thought=opened)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens except those that mark a thought."""
        backend = self._tokenizer.backend
        with panics_as_errors():
            if self._mark_ids.isdisjoint(token_ids):
                return backend.decode(list(token_ids), skip_special_tokens=True)
            runs = groupby(token_ids, self._mark_ids.__contains__)
            return "".join(backend.decode(list(ids), skip_special_tokens=not marks) for marks, ids in runs)

    def answer(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """Return the text of an answer without its thoughts."""
        splitter = self.splitter(prompt)
        chunks = [*splitter.feed(self.decode(answer)), *splitter.rest()]
        return "".join(chunk.text for chunk in chunks if not chunk.thought).strip()
