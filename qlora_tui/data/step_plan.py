"""Plans optimizer steps: the samples of each sequence, their order, and the number of steps of a run.

All steps of a run are planned before it starts, from recipe and seed alone. A step is a list of sequences, a
sequence a list of samples. The trainer plans with tokenized samples; before a launch the same code counts the
steps from sample lengths. :mod:`qlora_tui.training.batches` makes micro-batches from the sequences.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

from qlora_tui.data.store import GOOD
from qlora_tui.recipe.schema import Recipe


class Lengths(Protocol):
    """The lengths of a data set's samples, from which the steps of a run are counted."""

    def __len__(self) -> int: ...

    def length(self, i: int, /) -> int:
        """Return the length of sample ``i`` in tokens."""

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """Return the indices of the samples of one epoch, in random order."""


class SidedLengths(Lengths, Protocol):
    """The lengths of good and bad answers."""

    def of_side(self, side: int, /) -> Lengths:
        """Return the samples of one side, in order."""


class TokenizedDataset(Lengths, Protocol):
    """The interface of a tokenized data set; ``qlora_tui.data.store.Samples`` implements it."""

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Return the token ids of sample ``i``."""

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """Return 1 for each token of sample ``i`` in the loss, else 0."""

    def weights(self, i: int, /) -> Sequence[float] | None:
        """Return the weight of each token; None if each token in the loss has weight 1."""


class SidedDataset(TokenizedDataset, Protocol):
    """Tokenized samples that are good or bad answers; ``qlora_tui.data.store.Samples`` implements it."""

    def side(self, i: int, /) -> int:
        """Return ``GOOD`` or ``BAD`` of :mod:`qlora_tui.data.store`."""

    def of_side(self, side: int, /) -> SidedDataset:
        """Return the samples of one side, in order."""


class Pairs:
    """The pairs of a data set, numbered from 0."""

    def __init__(self, samples: SidedLengths) -> None:
        self._samples = samples
        self._chosen = samples.of_side(GOOD)

    def __len__(self) -> int:
        return len(self._samples) // 2

    def length(self, pair: int) -> int:
        """Return the number of tokens of both sides."""
        return sum(self._samples.length(i) for i in members((pair,)))

    def epoch(self, epoch: int, seed: int) -> Sequence[int]:
        """Return the pairs in the random order of one epoch."""
        return self._chosen.epoch(epoch, seed)


def members(pairs: Sequence[int]) -> tuple[int, ...]:
    """Return the samples of these pairs; in each pair the chosen side is first."""
    return tuple(i for pair in pairs for i in (2 * pair, 2 * pair + 1))


PackedSamples: TypeAlias = tuple[int, ...]
"""Indices of the samples in one sequence; without packing, one sample or the two samples of a pair."""


REPLAYED_TOKENS = 90
"""Typical number of tokens of a replayed answer with its prompt."""
_LENGTH_GROUP = 16
"""Number of steps in each group that is sorted by length, if sequences are padded."""


@dataclass(frozen=True)
class PlannedStep:
    """The sequences of one optimizer step."""

    sequences: tuple[PackedSamples, ...]
    epoch: float
    """Passes over the data up to and including this step, as a fraction."""
    ends_epoch: bool


@dataclass(frozen=True)
class StepPlan:
    """Every step of a run."""

    steps: tuple[PlannedStep, ...]
    sequences_per_epoch: int
    steps_per_epoch: int
    """Number of steps of the first epoch; with fractional weights other epochs may differ by one."""


def plan_steps(samples: TokenizedDataset, recipe: Recipe, *, padding_free: bool) -> StepPlan:
    """Plan every step of a run.

    ``padding_free``: whether a micro-batch is one sequence of isolated samples.
    """
    training = recipe.training
    steps: list[PlannedStep] = []
    first_sequences = first_steps = 0
    units = _units(samples, recipe)
    for epoch in range(math.ceil(training.epochs)):
        order = units.epoch(epoch, training.seed)
        shuffle = random.Random(f"{training.seed}/{epoch}/rows")
        sequences = _sequences(order, [units.length(i) for i in order], recipe, padding_free=padding_free)
        if padding_free and recipe.data.packing:
            shuffle.shuffle(sequences)
        if not padding_free:
            sequences = _group_by_length(sequences, units, recipe.effective_batch, shuffle)
        if recipe.trains_pairs:
            sequences = [members(sequence) for sequence in sequences]
        if not epoch:
            first_sequences = len(sequences)
            first_steps = math.ceil(len(sequences) / recipe.effective_batch)
        share = min(1.0, training.epochs - epoch)
        sequences = sequences[: _trained(len(sequences), share)]
        steps += _steps_of(sequences, epoch, share, recipe.effective_batch)
        if training.max_steps and len(steps) >= training.max_steps:
            del steps[training.max_steps :]
            break
    return StepPlan(tuple(steps), first_sequences, first_steps)


@dataclass(frozen=True)
class StepCount:
    """The number of steps of a run."""

    per_epoch: int
    """Number of steps of the first epoch."""
    all_epochs: int
    """Number of steps of all epochs, without the limit ``training.max_steps``."""
    tokens: int
    """Number of tokens of the first epoch, without padding."""


def count_steps(
    samples: Lengths, recipe: Recipe, *, padding_free: bool, epochs_are_equal: bool = True
) -> StepCount:
    """Count the steps that :func:`plan_steps` would plan without the limit ``training.max_steps``.

    ``training.replay_share`` adds answers of the base model. They are not known yet, so they count with a
    typical length.

    Args:
        samples: lengths of the training samples.
        padding_free: whether a micro-batch is one sequence of isolated samples.
        epochs_are_equal: whether every epoch has the same samples, because no source has a fractional weight.
    """
    training, units = recipe.training, _units(samples, recipe)
    steps = per_epoch = tokens = sequences = 0
    for epoch in range(math.ceil(training.epochs)):
        if not epoch or not epochs_are_equal:
            order = units.epoch(epoch, training.seed)
            lengths = [units.length(i) for i in order]
            lengths += [REPLAYED_TOKENS] * replayed(len(order), training.replay_share)
            numbers = range(len(lengths))
            sequences = len(_sequences(numbers, lengths, recipe, padding_free=padding_free))
            if not epoch:
                tokens, per_epoch = sum(lengths), math.ceil(sequences / recipe.effective_batch)
        share = min(1.0, training.epochs - epoch)
        steps += math.ceil(_trained(sequences, share) / recipe.effective_batch)
    return StepCount(per_epoch, steps, tokens)


def _units(samples: Lengths, recipe: Recipe) -> Lengths:
    """Return the units that are packed into sequences: samples, or pairs of samples."""
    return Pairs(cast("SidedLengths", samples)) if recipe.trains_pairs else samples


def _sequences(
    order: Sequence[int], lengths: Sequence[int], recipe: Recipe, *, padding_free: bool
) -> list[PackedSamples]:
    """Return the sequences of an epoch's samples or pairs, packed if recipe and ``padding_free`` say so."""
    if not (padding_free and recipe.data.packing):
        return [(i,) for i in order]
    return pack(order, lengths, recipe.data.max_length * (2 if recipe.trains_pairs else 1))


def _trained(sequences: int, share: float) -> int:
    """Return how many of an epoch's sequences are trained if only ``share`` of them are; at least 1."""
    return max(1, round(share * sequences))


def pack(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[PackedSamples]:
    """Pack whole samples into few sequences by best-fit decreasing.

    ``pack([7, 8, 9], [3, 2, 1], capacity=4)`` gives ``[(7, 9), (8,)]``: the longest samples are placed first,
    and each goes into the fullest sequence that still has room for it. A sample longer than ``capacity`` gets
    its own sequence.

    Args:
        order: indices of the samples.
        lengths: their lengths in tokens, in the same order.
        capacity: tokens per sequence.
    """
    by_length = sorted(range(len(order)), key=lambda k: -lengths[k])
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []
    """(tokens left, sequence), ascending, so the first entry that is large enough is the best fit."""
    for k in by_length:
        place = bisect_left(free, (lengths[k], -1))
        if place == len(free):
            sequences.append([])
            left, sequence = capacity, len(sequences) - 1
        else:
            left, sequence = free.pop(place)
        sequences[sequence].append(order[k])
        if left > lengths[k]:
            insort(free, (left - lengths[k], sequence))
    return [tuple(sequence) for sequence in sequences]


def _steps_of(
    sequences: Sequence[PackedSamples], epoch: int, share: float, effective_batch: int
) -> Iterator[PlannedStep]:
    for start in range(0, len(sequences), effective_batch):
        end = min(start + effective_batch, len(sequences))
        yield PlannedStep(
            tuple(sequences[start:end]), epoch + share * end / len(sequences), end == len(sequences)
        )


def _group_by_length(
    sequences: list[PackedSamples],
    samples: Lengths,
    effective_batch: int,
    shuffle: random.Random,
) -> list[PackedSamples]:
    """Put sequences of similar length into the same step to reduce padding, and shuffle the steps.

    Only full steps are shuffled; a shorter last step stays last.
    """
    window = _LENGTH_GROUP * effective_batch
    steps: list[list[PackedSamples]] = []
    for start in range(0, len(sequences), window):
        group = sorted(sequences[start : start + window], key=lambda sequence: samples.length(sequence[0]))
        steps += [group[k : k + effective_batch] for k in range(0, len(group), effective_batch)]
    whole = [step for step in steps if len(step) == effective_batch]
    shuffle.shuffle(whole)
    rest = [step for step in steps if len(step) < effective_batch]
    return [sequence for step in whole + rest for sequence in step]


def replayed(samples: int, share: float) -> int:
    """Return the number of answers to add to ``samples`` so that the answers are ``share`` of the total."""
    return round(samples * share / (1 - share))
