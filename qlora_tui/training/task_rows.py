"""A validation prompt with its reference and the answers of base and adapter, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_tui.data.answer_decoder import AnswerDecoder
from qlora_tui.data.conversation import Conversation
from qlora_tui.data.excluded_rows import file_names
from qlora_tui.data.row_index import row_at
from qlora_tui.data.sources import conversation_of, every_source, open_file_of, paths_of
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data
from qlora_tui.runs.task_metrics.answer_metrics import TaskRow
from qlora_tui.runs.task_metrics.tool_call_texts import read_calls
from qlora_tui.training.task_prompts import TaskPrompt

_PROMPT_TOKENS_SHOWN = 200


class TaskRows:
    """Turns prompts and answers of one recipe's data from token ids into text."""

    def __init__(self, data: Data, tokenizer: ChatTokenizer) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._decoder = AnswerDecoder(tokenizer)
        self._ends = frozenset(tokenizer.turn_end_ids)

    def row(self, prompt: TaskPrompt, base: Sequence[int], adapter: Sequence[int]) -> TaskRow:
        """The record of a prompt.

        Args:
            prompt: with its reference.
            base: token ids of the base's answer, with its turn end.
            adapter: those of the adapter's.

        Raises:
            UserError: the row offers tools and cannot be read again.
        """
        reference = self._raw(prompt.reference)
        tools = self._tools(prompt) if read_calls(reference) else ()
        return TaskRow(
            source=prompt.source,
            row=prompt.row,
            file=prompt.file,
            prompt=self._tokenizer.decode(prompt.ids[-_PROMPT_TOKENS_SHOWN:]),
            reference=self._decoder.answer(prompt.ids, prompt.reference),
            base=self._decoder.answer(prompt.ids, base),
            adapter=self._decoder.answer(prompt.ids, adapter),
            base_ended=base[-1] in self._ends,
            adapter_ended=adapter[-1] in self._ends,
            tools=tools,
            reference_raw=reference if tools else "",
            base_raw=self._raw(base) if tools else "",
            adapter_raw=self._raw(adapter) if tools else "",
        )

    def _raw(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._ends])

    def _tools(self, prompt: TaskPrompt) -> tuple[dict[str, Any], ...]:
        """The tools that a row offers."""
        source = every_source(self._data)[prompt.source]
        paths, _ = paths_of(source)
        path = paths[file_names(source.path, paths).index(prompt.file)]
        row = row_at(path, prompt.row)
        file = open_file_of(source, self._data.preferences, str(path))
        conversation = conversation_of(row, file) if row is not None else None
        return conversation.tools if isinstance(conversation, Conversation) else ()
