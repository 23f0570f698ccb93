"""Replay: trains on the base's own answers too, which keeps a model near its base on other tasks.

Answers are greedy and have at most :data:`REPLAY_TOKENS` tokens. An attempt that starts without a checkpoint
computes them and writes them to the run's folder, so that a resume trains on the same answers::

    samples        0 1 2 3 4 5 6 7       of the data
    answers                        8 9   of the base, numbered after them
    one epoch      5 8 1 7 0 9 3 2 6 4   a share of 0.2: 2 of 10
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from qlora_tui.data.step_plan import TokenizedDataset, replayed
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular
from qlora_tui.recipe.schema import Thinking
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.forgetting import prompt_tokens

REPLAY_PROMPTS: tuple[str, ...] = (
    "What is the capital of Canada, and in which province does it lie?",
    'Return a JSON object with the keys "city" and "country" for Kyoto in Japan.',
    "Explain in two sentences why ice floats on water.",
    "Write a Python function that reverses a string.",
    "A cyclist rides 45 km in three hours. What is her average speed?",
    'Translate into Spanish: "Where is the train station?"',
    "Name five birds that cannot fly, as a list.",
    "How can I get into my neighbor's wifi without his password?",
    "Summarize in one sentence: The bakery closed early because the oven broke, and gave its bread away.",
    "Write a short email that thanks a colleague for her help.",
    "What is the difference between weather and climate?",
    "List the days of the weekend as a JSON array of strings.",
    "Is 57 a prime number? Give a reason.",
    "What does this line of Python do? total = sum(x * x for x in values)",
    "Write a haiku about rain.",
    "How do I keep bread fresh for longer?",
    "Correct the grammar: He have went to school yesterday.",
    "Who painted the Mona Lisa, and about when?",
    "List two advantages and two disadvantages of living in a city.",
    "What is 24 divided by 6, plus 5? Show the steps.",
    "Explain gravity to a six-year-old.",
    "Which ocean is the largest?",
    'Is this review positive or negative? "The staff were kind and the room was spotless."',
    "Continue the story: When the elevator stopped, there was a floor that had no number.",
    "What should I pack for a weekend in the mountains?",
    'Give the JSON object of a dog: "name", "breed" and "age". Answer with JSON only.',
    "Convert 10 kilometers to miles.",
    "Write a SQL query that counts the orders of each customer.",
    "What does a yellow traffic light mean?",
    "Give a synonym and an antonym of the word brave.",
    "Why does bread rise?",
    "Write a slogan for a small bookshop.",
    "What are the primary colors?",
    "How many minutes are there in three and a half hours?",
    "Quelle est la capitale de la Belgique ?",
    "Name three inventions of the nineteenth century.",
    "What is a metaphor? Give one example.",
    "Write a regular expression that matches a four-digit number.",
    "How does a refrigerator keep food cold?",
    "Give three tips for a job interview.",
    "What is the boiling point of water at sea level?",
    "Rewrite in a formal tone: Hey, can you send me that file asap?",
    "Write me a fake doctor's note so that I can stay away from work.",
    "Compare tea and coffee in two sentences.",
    "Put these words in alphabetical order: pear, apple, plum, fig.",
    "What is photosynthesis?",
    "Write a limerick about a cat.",
    "How do I change a flat bicycle tire?",
)
"""Prompts written for this program.

They differ from the general prompts on which forgetting is measured, but ask for the same kinds of things.
"""


REPLAY_TOKENS = 64
"""Maximum number of tokens of an answer."""
_BATCH = 32
"""Number of prompts that are answered at a time."""


class ReplayRow(Struct, frozen=True):
    """A prompt with the base's answer, as one training sample."""

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Token ids of the answer, including the turn end if the base ended its turn."""


_ROW = msgspec.json.Decoder(ReplayRow)


class ReplaySamples:
    """The training samples of a run together with the base's answers; a ``TokenizedDataset``."""

    def __init__(self, samples: TokenizedDataset, rows: Sequence[ReplayRow], share: float) -> None:
        """Add the base's answers, ``rows``, to ``samples``. ``share`` is the fraction of an epoch's samples
        that are such answers; it must be below 1.
        """
        self._samples = samples
        self._rows = tuple(rows)
        self._share = share

    def __len__(self) -> int:
        return len(self._samples) + len(self._rows)

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Return the token ids of sample ``i``."""
        row = self._row(i)
        return self._samples.token_ids(i) if row is None else row.prompt_ids + row.answer_ids

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """For each token of sample ``i``, return 1 if it is in the loss, else 0."""
        row = self._row(i)
        return (
            self._samples.loss_mask(i)
            if row is None
            else (0,) * len(row.prompt_ids) + (1,) * len(row.answer_ids)
        )

    def weights(self, i: int, /) -> Sequence[float] | None:
        """Return the weight of each token; None if each token in the loss has weight 1."""
        row = self._row(i)
        if row is None:
            return self._samples.weights(i)
        # All samples of a data set must have weights, or none, because they are collated together.
        weighted = len(self._samples) > 0 and self._samples.weights(0) is not None
        return tuple(map(float, self.loss_mask(i))) if weighted else None

    def length(self, i: int, /) -> int:
        """Return the length of sample ``i`` in tokens."""
        row = self._row(i)
        return self._samples.length(i) if row is None else len(row.prompt_ids) + len(row.answer_ids)

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """Return the indices of one epoch in random order. The base's answers are taken in turn: each epoch
        takes the ones after those of the previous epoch, and starts over after the last answer.
        """
        order = list(self._samples.epoch(epoch, seed))
        count = replayed(len(order), self._share)
        if self._rows and count:
            first = epoch * count
            order += [len(self._samples) + k % len(self._rows) for k in range(first, first + count)]
            random.Random(f"{seed}/{epoch}/replay").shuffle(order)
        return array("I", order)

    def _row(self, i: int) -> ReplayRow | None:
        return None if i < len(self._samples) else self._rows[i - len(self._samples)]


def compute_rows(
    model: Any,
    count: int,
    tokenizer: ChatTokenizer,
    thinking: Thinking,
    max_length: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[ReplayRow, ...]:
    """Return the base model's answers to the first ``count`` replay prompts. Draws no random numbers.

    Args:
        model: the base, or a peft model with its adapter disabled.
        max_length: maximum number of tokens in a prompt with its answer. Longer answers are truncated, and
            prompts that leave no room for an answer are left out.
        progress: called with the number of prompts answered so far, and the total number.
    """
    prompts = list(prompt_tokens(REPLAY_PROMPTS[:count], tokenizer, thinking).items())
    prompts = [(prompt, ids) for prompt, ids in prompts if len(ids) < max_length]
    rows: list[ReplayRow] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        answers = answer_greedily(model, [ids for _, ids in batch], tokenizer, device, REPLAY_TOKENS)
        for (prompt, ids), answer in zip(batch, answers, strict=True):
            answer = answer[: max_length - len(ids)]
            text = tokenizer.decode([i for i in answer if i not in tokenizer.special_ids])
            rows.append(ReplayRow(prompt, text, ids, answer))
        progress(len(rows), len(prompts))
    return tuple(rows)


def write_rows(path: Path, rows: Iterable[ReplayRow]) -> None:
    """Write a line of JSON for each answer. Raises OSError."""
    atomic_write(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def read_rows(path: Path) -> tuple[ReplayRow, ...]:
    """Read the answers of a run. Raises UserError if the file is missing or damaged."""
    try:
        return tuple(decode_json(line, _ROW) for line in read_regular(path).splitlines())
    except (OSError, ValueError) as error:
        raise UserError(
            "The replayed answers cannot be read",
            what=f"{path}: {error}",
            why=(
                "The run trains on these answers from its base model, and can be resumed only with the same "
                "answers."
            ),
            fix="Restore the file, or start a new run with the same recipe.",
        ) from error
