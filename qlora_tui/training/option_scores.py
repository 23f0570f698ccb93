"""Log probabilities of whole answers after a prompt: all options of several prompts in one forward.

A row is a prompt with its options, as long as the prompt with the longest option. The options form a tree:
common beginnings are computed once, and each token attends to the prompt and to its own branch. The trees of
several rows lie end to end in one sequence. For the prompt ``p q`` with the options ``a x``,
``a y`` and ``b``, each with its turn end ``.``::

    sequence   p q a x y b      targets of q: a b   of a: x y   of x, y and b: the end
    position   0 1 2 3 3 2
    attends    p
               p q
               p q a
               p q a x
               p q a . y
               p q . . . b

Not every model can compute such a sequence: with a recurrent state, with positions that are not taken from
the arguments, or with a window shorter than a row, tokens attend to wrong tokens. So the packed scores of the
longest row are compared with scores computed for each option separately. If they differ by more than
rounding, the shortest row is compared, and then rows of lengths in between, until the longest row that agrees
is known. For longer rows, each option is computed as a sequence of its own after the prompt. Such sequences
are padded at the end, where no token of a causal model attends to the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.training.checks.rounding import NOISE_FACTOR, rounding_noise
from qlora_tui.training.scoring import no_grad_eval

PACKED_TOKENS = 512
"""Maximum number of tokens in a sequence of several trees."""
_LONGEST_PACKED = 4096
"""Maximum number of tokens of a packed row: a sequence's mask grows with the square of its length."""
_BATCH_TOKENS = 4096
"""Maximum number of tokens in a batch in which each option is a sequence of its own."""
_BATCH_LOGITS = 1 << 26
"""Maximum number of logits of a forward: 256 MiB in float32, or 256 positions with a vocabulary of 256k."""
_MULTIPLE = 64
"""Lengths are padded to multiples of this number, because oneDNN creates CPU kernels for each length."""
_HEAD_ROWS = 128
"""Number of vocabulary-wide float32 rows in memory at a time."""
_COMPARED = 6
"""Number of options of a row that are compared."""

Scores = tuple[float, ...]
"""Log probability of each option, its turn end included, in nats."""


class Choice(NamedTuple):
    """A prompt and the answers to choose from, as token ids; each answer with its turn end."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Length of the prompt with the longest option."""
        return len(self.prompt) + max(map(len, self.options))


class _Part(NamedTuple):
    """Some options of one of several choices."""

    number: int
    """Index of the choice."""
    options: tuple[int, ...]
    """Indices of these options in the choice."""
    choice: Choice
    """The prompt with only these options."""

    @classmethod
    def of(cls, number: int, choice: Choice, options: Sequence[int]) -> _Part:
        """Build the part of a choice that has the options with these indices."""
        some = Choice(choice.prompt, tuple(choice.options[option] for option in options))
        return cls(number, tuple(options), some)


class OptionScorer:
    """Scores options with a model in its current state; the caller selects the adapter."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self._dtype = dtype
        self._device = device
        self.packed_tokens = 0
        """Length up to which rows have been packed with correct scores."""
        self.failed_tokens = 1 << 62
        """Length from which rows are not packed, because their scores were wrong."""

    def score(
        self, choices: Sequence[Choice], progress: Callable[[int], None] = lambda done: None
    ) -> list[Scores]:
        """Return the scores of each choice's options, in order.

        ``progress`` is called with the number of finished choices.
        """
        scores = [[0.0] * len(choice.options) for choice in choices]
        parts = [part for number, choice in enumerate(choices) for part in self._parts(number, choice)]
        parts.sort(key=lambda part: -part.choice.tokens)
        done = 0
        with no_grad_eval(self._model):
            self._compare([part.choice for part in parts])
            for batch in self._batches(parts):
                rows = [part.choice for part in batch]
                if rows[0].tokens <= self.packed_tokens:
                    found = self._packed(rows)
                else:
                    found = [self._each_apart(row, _BATCH_TOKENS) for row in rows]
                for part, values in zip(batch, found, strict=True):
                    for option, value in zip(part.options, values.tolist(), strict=True):
                        scores[part.number][option] = value
                done += len(batch)
                progress(len(choices) * done // len(parts))
        return [tuple(each) for each in scores]

    @property
    def _most_places(self) -> int:
        """Maximum number of positions in a forward whose logits fit into the memory set aside for them."""
        return max(1, _BATCH_LOGITS // int(self._model.config.get_text_config().vocab_size))

    def _parts(self, number: int, choice: Choice) -> Iterator[_Part]:
        """Yield the options of a choice in parts that fit into a forward and into the longest sequence.

        Similar options are in the same part.
        """
        room = min(self._most_places, _LONGEST_PACKED - len(choice.prompt))
        part: list[int] = []
        places = 0
        for option in sorted(range(len(choice.options)), key=choice.options.__getitem__):
            size = len(choice.options[option])
            if part and places + size > room:
                yield _Part.of(number, choice, part)
                part, places = [], 0
            part.append(option)
            places += size
        yield _Part.of(number, choice, part)

    def _batches(self, parts: Sequence[_Part]) -> Iterator[list[_Part]]:
        """Yield batches of as many consecutive parts as fit into a sequence."""
        batch: list[_Part] = []
        tokens = places = 0
        for part in parts:
            # An upper bound: tokens that options share are counted for each option.
            answers = sum(map(len, part.choice.options))
            size = len(part.choice.prompt) + answers
            if batch and (tokens + size > PACKED_TOKENS or places + answers > self._most_places):
                yield batch
                batch, tokens, places = [], 0, 0
            batch.append(part)
            tokens += size
            places += answers
        if batch:
            yield batch

    def _compare(self, rows: Sequence[Choice]) -> None:
        """Determine which rows may be packed, comparing the longest row first."""
        unknown, count = rows, 0
        while unknown := [
            row
            for row in unknown
            if self.packed_tokens < row.tokens < min(self.failed_tokens, _LONGEST_PACKED)
        ]:
            # Most models can pack all rows, some none, and those with windows only short rows.
            row = unknown[(0, -1, len(unknown) // 2)[min(count, 2)]]
            if self._agrees(row):
                self.packed_tokens = row.tokens
            else:
                self.failed_tokens = row.tokens
            count += 1

    def _agrees(self, row: Choice) -> bool:
        """Return whether packed scores equal those of separately computed options, within rounding errors."""
        # Compare only some options, spread over all of them: each takes several forwards.
        count = min(len(row.options), _COMPARED)
        numbers = [number * len(row.options) // count for number in range(count)]
        some = Choice(row.prompt, tuple(row.options[number] for number in numbers))
        expected = self._each_apart(some, 0)
        try:
            # Pack the row after another one, as in a sequence of several rows.
            other = Choice(row.prompt[-PACKED_TOKENS:], some.options)
            difference = _largest_difference(self._packed([other, row])[1][numbers], expected)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        noise = rounding_noise(
            self._model,
            self._dtype,
            lambda: _largest_difference(self._each_apart(some, 0), expected),
            difference,
        )
        return difference <= NOISE_FACTOR * noise

    def _packed(self, rows: Sequence[Choice]) -> list[Tensor]:
        """Return the scores (options,) of each row, from one forward."""
        forest = Forest.of(rows)
        length = -(-len(forest.tokens) // _MULTIPLE) * _MULTIPLE
        allowed = torch.eye(length, dtype=torch.bool)
        allowed[: len(forest.tokens), : len(forest.tokens)] = forest.attends()
        mask = torch.zeros(length, length, dtype=self._dtype)
        mask.masked_fill_(~allowed, torch.finfo(self._dtype).min)
        padding = [0] * (length - len(forest.tokens))
        places = list(forest.targets)
        logits = self._model(
            input_ids=self._tensor([forest.tokens + padding]),
            attention_mask=mask[None, None].to(self._device),
            position_ids=self._tensor([forest.positions + padding]),
            logits_to_keep=self._tensor(places + places[-1:] * (-len(places) % _MULTIPLE)),
            use_cache=False,
        ).logits[0]
        read = {
            (place, target): value
            for place, targets, values in zip(
                places, forest.targets.values(), _log_probabilities(logits, forest.targets), strict=False
            )
            for target, value in zip(targets, values, strict=True)
        }
        return [
            torch.tensor([sum(read[step] for step in path) for path in paths], dtype=torch.float64)
            for paths in forest.paths
        ]

    def _each_apart(self, row: Choice, batch_tokens: int) -> Tensor:
        """Return the scores (options,) of a row, with each option computed separately after the prompt.

        A batch has one sequence for each option, and at most ``batch_tokens`` tokens unless it has only one
        option.
        """
        start, longest = len(row.prompt), max(map(len, row.options))
        length = row.tokens - 1
        count = max(1, min(batch_tokens // length, self._most_places // longest))
        scores: list[float] = []
        for first in range(0, len(row.options), count):
            options = row.options[first : first + count]
            ids = [[*row.prompt, *option[:-1]] for option in options]
            length = max(map(len, ids))
            places = range(start - 1, length)
            logits = self._model(
                input_ids=self._tensor([each + [0] * (length - len(each)) for each in ids]),
                logits_to_keep=self._tensor(list(places)),
                use_cache=False,
            ).logits
            for option, rows in zip(options, logits, strict=True):
                targets = {place: [token] for place, token in enumerate(option)}
                scores.append(sum(value for (value,) in _log_probabilities(rows, targets)))
        return torch.tensor(scores, dtype=torch.float64)

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._device)


@dataclass
class Forest:
    """The trees of several rows, end to end."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """For each token, the index in ``tokens`` of the token before it; -1 for the first token of a prompt."""
    positions: list[int] = field(default_factory=list)
    targets: dict[int, list[int]] = field(default_factory=dict)
    """Tokens whose probability is read from the logits of a token, keyed by the index of that token."""
    paths: list[list[list[tuple[int, int]]]] = field(default_factory=list)
    """Key and item of ``targets`` for each token of each option of each row."""

    @classmethod
    def of(cls, rows: Sequence[Choice]) -> Forest:
        """Build the trees of rows; the last token of an option is only a target."""
        forest = cls()
        for row in rows:
            last = -1
            for token in row.prompt:
                last = forest._add(token, last)
            places: dict[tuple[int, int], int] = {}
            paths = []
            for option in row.options:
                place, path = last, []
                for number, token in enumerate(option):
                    step = place, token
                    path.append(step)
                    targets = forest.targets.setdefault(place, [])
                    if token not in targets:
                        targets.append(token)
                    if number < len(option) - 1:
                        if step not in places:
                            places[step] = forest._add(token, place)
                        place = places[step]
                paths.append(path)
            forest.paths.append(paths)
        return forest

    def _add(self, token: int, parent: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.positions.append(0 if parent < 0 else self.positions[parent] + 1)
        return len(self.tokens) - 1

    def attends(self) -> Tensor:
        """Return a mask (tokens, tokens), True where a token attends: to itself and to its ancestors."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                mask[place] |= mask[parent]
        return mask


def _log_probabilities(logits: Tensor, targets: dict[int, list[int]]) -> Iterator[list[float]]:
    """Yield the log probabilities of the targets of each row of logits (positions, vocabulary), in order."""
    wanted = list(targets.values())
    for start in range(0, len(wanted), _HEAD_ROWS):
        part = wanted[start : start + _HEAD_ROWS]
        logs = logits[start : start + len(part)].float().log_softmax(-1)
        rows = torch.tensor([row for row, each in enumerate(part) for _ in each], device=logits.device)
        columns = torch.tensor([token for each in part for token in each], device=logits.device)
        values = iter(logs[rows, columns].tolist())
        for each in part:
            yield [next(values) for _ in each]


def _largest_difference(scores: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two scores of an option; infinite if one is NaN.

    Before the comparison, the scores are normalized over the options, like log probabilities of a choice.
    """
    difference = float((scores.log_softmax(0) - expected.log_softmax(0)).abs().max())
    return difference if difference == difference else float("inf")
