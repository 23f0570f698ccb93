"""Greedy answers of base or adapter to many prompts, in batches, stored as they come.

A file of answers belongs to one base, adapter and number of tokens; its lines hold the hash of a prompt and
the token ids of its answer. An interrupted evaluation continues with what is there, and runs on the same base
and data share the base's answers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import decode_json
from qlora_tui.files import open_append, read_regular

BATCH_ROWS = 16
_BATCH_TOKENS = 8192
"""Most tokens of a batch, prompts and answers together."""
_MAX_BYTES = 1 << 28

AnswerBatch = Callable[[list[tuple[int, ...]]], list[tuple[int, ...]]]
"""Answers prompts of token ids with token ids."""


class _Line(Struct, frozen=True):
    prompt: str
    answer: tuple[int, ...]


_LINES = msgspec.json.Decoder(_Line)


class AnswerStore:
    """Answers in a file, by prompt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, tuple[int, ...]] = {}
        try:
            content = read_regular(path, _MAX_BYTES)
        except OSError:
            content = b""
        for line in content.splitlines():
            try:
                stored = decode_json(line, _LINES)
            except ValueError:
                # The last line of a process that was killed.
                continue
            self._answers[stored.prompt] = stored.answer
        self._is_torn = bool(content) and not content.endswith(b"\n")

    def get(self, prompt: Sequence[int]) -> tuple[int, ...] | None:
        """The answer to a prompt; None where there is none."""
        return self._answers.get(_hash(prompt))

    def add(self, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[int, ...]]) -> None:
        """Store answers. Raises OSError."""
        lines = [_Line(_hash(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        with open_append(self._path) as file:
            content = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
            file.write(b"\n" + content if self._is_torn else content)
        self._is_torn = False
        self._answers |= {line.prompt: line.answer for line in lines}


def answer_all(
    prompts: Sequence[tuple[int, ...]],
    stored: AnswerStore,
    max_new_tokens: int,
    answer: AnswerBatch,
    progress: Callable[[int], None],
) -> list[tuple[int, ...]]:
    """The answers to all prompts, in order; only those that are not stored are computed.

    Args:
        prompts: token ids.
        stored: holds earlier answers, and takes the others.
        max_new_tokens: most tokens of an answer.
        answer: answers one batch.
        progress: called with the number of answers there are.
    """
    missing = sorted({prompt for prompt in prompts if stored.get(prompt) is None}, key=len)
    done = len(prompts) - len(missing)
    progress(done)
    for batch in _batches(missing, max_new_tokens):
        stored.add(batch, answer(batch))
        done += len(batch)
        progress(done)
    answers = [stored.get(prompt) for prompt in prompts]
    return [each for each in answers if each is not None]


def _batches(prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Prompts of about one length together, the longest first: what does not fit fails at once."""
    batch: list[tuple[int, ...]] = []
    for prompt in reversed(prompts):
        longest = len(batch[0]) if batch else len(prompt)
        if batch and (
            len(batch) == BATCH_ROWS or (len(batch) + 1) * (longest + max_new_tokens) > _BATCH_TOKENS
        ):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _hash(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(array("I", prompt).tobytes(), digest_size=16).hexdigest()
