"""Prompts of validation rows with their references, as token ids and as text.

A prompt is the part of a row that, in training, precedes the last answer in the loss::

    ids        <user> how are you <end> <assistant> fine <end>
    mask         0     0   0   0    0        0        1    1
    prompt     ------------------------------------
    reference                                         ----------
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_tui.data.conversation import Conversation, ToolCall
from qlora_tui.data.excluded_rows import file_names
from qlora_tui.data.read import row_at
from qlora_tui.data.sources import conversation_of, every_source, open_file_of, paths_of
from qlora_tui.data.store import Samples
from qlora_tui.data.tokenizer import AnswerDecoder, ChatTokenizer
from qlora_tui.data.tool_calls import CallText, call_format
from qlora_tui.recipe.schema import Data
from qlora_tui.runs.task_metrics.answer_metrics import TaskRow

_MIN_NEW_TOKENS, _MAX_NEW_TOKENS = 32, 512
_STEP_TOKENS = 32
"""The token limit of answers is rounded up to a multiple of this number.

Answers with different limits are stored in different files. If the longest reference changes a little, the
limit usually stays the same, and the stored answers can be used again.
"""


class TaskPrompt(NamedTuple):
    """One prompt with its reference."""

    source: int
    row: int
    file: str
    """Name of the row's file in the source; empty if the source is one file."""
    ids: tuple[int, ...]
    """Token ids of the prompt."""
    reference: tuple[int, ...]
    """Token ids of the reference answer, without the tokens after its turn end."""
    sample: int
    """Index of the prompt's sample in the validation data."""


def task_prompts(samples: Samples, turn_ends: frozenset[int], most: int) -> list[TaskPrompt]:
    """Return up to ``most`` prompts, spread evenly over the rows.

    Rows that were truncated before the end of their answer, and rows without a prompt, are left out.

    Args:
        samples: the validation data.
        turn_ends: token ids that end a turn.
        most: maximum number of prompts, which must be at least 1.
    """
    prompts = []
    for i in range(len(samples)):
        place = *samples.origin(i), samples.file_name(i)
        if i + 1 < len(samples) and (*samples.origin(i + 1), samples.file_name(i + 1)) == place:
            # With this template, each turn of this row is a separate sample.
            continue
        ids, mask = tuple(samples.token_ids(i)), tuple(samples.loss_mask(i))
        bounds = last_answer(ids, mask, turn_ends)
        if bounds is not None:
            start, end = bounds
            prompts.append(TaskPrompt(*place, ids[:start], ids[start:end], i))
    count = min(len(prompts), most)
    return [prompts[number * len(prompts) // count] for number in range(count)]


def answer_limit(longest_reference: int, context_length: int) -> int:
    """Return the token limit of an answer: 1.5 times the longest reference, rounded up to a multiple of
    ``_STEP_TOKENS``. It is at least ``_MIN_NEW_TOKENS``, but never more than ``_MAX_NEW_TOKENS`` or half of
    the context.
    """
    wanted = -(-longest_reference * 3 // (2 * _STEP_TOKENS)) * _STEP_TOKENS
    return min(max(_MIN_NEW_TOKENS, wanted), _MAX_NEW_TOKENS, max(1, context_length // 2))


def last_answer(ids: Sequence[int], mask: Sequence[int], turn_ends: frozenset[int]) -> tuple[int, int] | None:
    """Return start and end of the last answer in the loss, up to and including its turn end.

    None if there is no such answer, or if it is empty, was truncated, or has no prompt.
    """
    stop = next((place + 1 for place in range(len(mask) - 1, -1, -1) if mask[place]), 0)
    start = stop
    while start and mask[start - 1]:
        start -= 1
    end = next((place + 1 for place in range(stop - 1, start - 1, -1) if ids[place] in turn_ends), 0)
    return (start, end) if start > 0 and end > start + 1 else None


_PROMPT_TOKENS_SHOWN = 200


class TaskRows:
    """Converts prompts and answers of one recipe's data from token ids to text."""

    def __init__(self, data: Data, tokenizer: ChatTokenizer) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._decoder = AnswerDecoder(tokenizer)
        self._ends = frozenset(tokenizer.turn_end_ids)
        self._call_format = call_format(tokenizer)

    def row(self, prompt: TaskPrompt, base: Sequence[int], adapter: Sequence[int]) -> TaskRow:
        """Return the record of a prompt.

        Args:
            prompt: the prompt with its reference.
            base: token ids of the base's answer, with its turn end.
            adapter: token ids of the adapter's answer, with its turn end.

        Raises:
            UserError: the reference may call a tool, and the row cannot be read again to find its tools.
        """
        texts = [self._raw(ids) for ids in (prompt.reference, base, adapter)]
        # Reading a row's tools takes time, so it is done only if the reference may call one.
        tools = self._tools(prompt) if self._may_call(texts[0]) else ()
        calls = [self._calls(text, tools) for text in texts]
        if not calls[0]:
            tools, texts, calls = (), ["", "", ""], [(), (), ()]
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
            reference_raw=texts[0],
            base_raw=texts[1],
            adapter_raw=texts[2],
            reference_calls=calls[0],
            base_calls=calls[1],
            adapter_calls=calls[2],
        )

    def _raw(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._ends])

    def _may_call(self, text: str) -> bool:
        return self._call_format is not None and (self._call_format.mark or "{") in text

    def _calls(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[ToolCall, ...]:
        """Return the calls in an answer's text; empty without tools, or if a call is malformed."""
        if self._call_format is None or not tools:
            return ()
        answer = CallText(self._call_format, tools)
        answer.feed(text)
        answer.rest()
        return answer.calls

    def _tools(self, prompt: TaskPrompt) -> tuple[dict[str, Any], ...]:
        """Return the tools that a row offers."""
        source = every_source(self._data)[prompt.source]
        paths, _ = paths_of(source)
        path = paths[file_names(source.path, paths).index(prompt.file)]
        row = row_at(path, prompt.row)
        file = open_file_of(source, self._data.preferences, str(path))
        conversation = conversation_of(row, file) if row is not None else None
        return conversation.tools if isinstance(conversation, Conversation) else ()
