"""The sequences of a planned step (:mod:`qlora_tui.data.step_plan`) as micro-batches of tensors.

The result of a step does not depend on how its sequences are split into micro-batches or over processes, so a
run can resume at any step, even with a smaller micro-batch.

A micro-batch is one long sequence without padding if samples can be isolated, else padded sequences. Samples
``a a a``, ``b b`` and ``c`` with packing, ``data.max_length`` 4 and a micro-batch of 2 sequences::

    sequences      (0, 2) and (1,)      3 + 1 and 2 of 4 tokens
    input_ids      [[a a a c b b]]      (1, 6): both sequences end to end, without padding
    position_ids   [[0 1 2 0 0 1]]      starts over at each sample
    labels         [[- a a - - b]]      - is IGNORED: the first token of a sample is predicted from nothing
    segments       [3, 1, 2]            lengths of the samples, which attend to themselves only

Without isolation each sample is a sequence, padded to the longest::

    input_ids      [[c _ _] [b b _] [a a a]]    (3, 3)
    attention_mask [[1 0 0] [1 1 0] [1 1 1]]

With preference methods that compare pairs, a chosen and a rejected answer to one prompt share a sequence. The
store holds the chosen side of pair ``k`` as sample ``2k`` and the rejected side as ``2k + 1``::

    pairs       0     1     2
    samples    0 1   2 3   4 5
    sequences  (0, 1, 4, 5) and (2, 3): pairs 0 and 2 packed together
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from qlora_tui.data.step_plan import (
    PackedSamples,
    Pairs,
    SidedDataset,
    StepPlan,
    TokenizedDataset,
    members,
    pack,
)
from qlora_tui.data.store import GOOD
from qlora_tui.training.loss import IGNORED, loss_positions
from qlora_tui.training.samples import Sample, SampleList


@dataclass(frozen=True)
class RowShape:
    """How samples are laid out in the inputs of a model."""

    packed: bool
    """Whether a row may hold several samples, each attending only to itself."""
    max_length: int
    """Maximum number of tokens of a row in this run."""
    multiple: int = 1
    """A packed row is padded to a multiple of this number of tokens."""
    pad_id: int = 0


def micro_batches(sequences: Sequence[PackedSamples], size: int) -> list[Sequence[PackedSamples]]:
    """Split the sequences of a step into micro-batches of ``size`` sequences."""
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


def validation_batches(
    samples: TokenizedDataset, size: int, shape: RowShape, *, pairs: bool = False
) -> list[list[PackedSamples]]:
    """Return all validation samples once, in micro-batches of ``size`` sequences.

    With ``pairs``, both samples of a pair are in the same micro-batch.
    """
    units = Pairs(cast("SidedDataset", samples)) if pairs else samples
    everything = range(len(units))
    if shape.packed:
        capacity = shape.max_length * (2 if pairs else 1)
        sequences = pack(everything, [units.length(i) for i in everything], capacity)
    else:
        sequences = sorted(((i,) for i in everything), key=lambda sequence: units.length(sequence[0]))
    if pairs:
        sequences = [members(sequence) for sequence in sequences]
    return [list(batch) for batch in micro_batches(sequences, size)]


def longest_micro_batch(
    step_plan: StepPlan, samples: TokenizedDataset, size: int, *, padding_free: bool
) -> list[PackedSamples]:
    """Return the sequences of the micro-batch with the most computed tokens, padding included."""
    longest: list[PackedSamples] = []
    most = 0
    for step in step_plan.steps:
        for sequences in micro_batches(step.sequences, size):
            tokens = computed_tokens(sequences, samples, padding_free=padding_free)
            if tokens > most:
                most, longest = tokens, list(sequences)
    return longest


def count_tokens(sequences: Sequence[PackedSamples], samples: TokenizedDataset) -> int:
    """Return the number of tokens in ``sequences``, without padding."""
    return sum(samples.length(i) for sequence in sequences for i in sequence)


def sum_loss_weights(sequences: Sequence[PackedSamples], samples: TokenizedDataset) -> float:
    """Return the sum of the loss weights of the tokens in ``sequences``, which divides a summed loss.

    The first token of a sample does not count, because it is predicted from nothing.
    """
    weights = (samples.weights(i) or samples.loss_mask(i) for i in _samples_of(sequences))
    return sum(sum(token_weights[1:]) for token_weights in weights)


def computed_tokens(
    sequences: Sequence[PackedSamples], samples: TokenizedDataset, *, padding_free: bool
) -> int:
    """Return how many tokens a forward pass over one micro-batch computes, padding included."""
    if padding_free:
        return count_tokens(sequences, samples)
    lengths = [samples.length(i) for i in _samples_of(sequences)]
    return len(lengths) * max(lengths)


def collate(sequences: Sequence[PackedSamples], samples: TokenizedDataset, shape: RowShape) -> dict[str, Any]:
    """Return the tensors of one micro-batch, on the CPU: the arguments of the model's forward.

    The module's docstring shows an example of both layouts. In a packed micro-batch, the last sample is
    padded so that the number of tokens is a multiple of ``shape.multiple``.

    Returns:
        Packed: ``input_ids``, ``position_ids`` and ``labels`` of (1, tokens), and ``segments``, the lengths
        of the samples. Padded: ``input_ids``, ``attention_mask`` and ``labels`` of (sequences, longest).
        Both also have ``loss_positions`` (:func:`.loss.loss_positions`) and, with sample weights,
        ``loss_weights``, fp32 with the same dimensions as the labels.
    """
    weighted = [samples.weights(i) for i in _samples_of(sequences)]
    weights = [torch.tensor(list(token_weights)) for token_weights in weighted if token_weights is not None]
    ids = [_tensor(samples.token_ids(i)) for sequence in sequences for i in sequence]
    labels = [_labels(i, tokens, samples) for i, tokens in zip(_samples_of(sequences), ids, strict=True)]
    if shape.packed:
        more = -sum(map(len, ids)) % shape.multiple
        for parts, value in ((ids, shape.pad_id), (labels, IGNORED), *([(weights, 0)] if weights else [])):
            parts[-1] = nn.functional.pad(parts[-1], (0, more), value=value)
    lengths = [len(tokens) for tokens in ids]
    if shape.packed:
        batch = {"loss_weights": torch.cat(weights)[None]} if weights else {}
        packed_labels = torch.cat(labels)[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        # Frequencies may depend on the largest position, so padding must not lengthen its sample.
        positions[:, positions.shape[1] - more :] = 0
        return batch | {
            "input_ids": torch.cat(ids)[None],
            "position_ids": positions,
            "labels": packed_labels,
            "loss_positions": loss_positions(packed_labels),
            "segments": lengths,
        }
    longest = max(lengths)
    batch = {"loss_weights": _padded(weights, longest, 0)} if weights else {}
    padded_labels = _padded(labels, longest, IGNORED)
    return batch | {
        "input_ids": _padded(ids, longest, shape.pad_id),
        "attention_mask": _padded([torch.ones(n, dtype=torch.long) for n in lengths], longest, 0),
        "labels": padded_labels,
        "loss_positions": loss_positions(padded_labels),
    }


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Copy a micro-batch to ``device``, without waiting for the GPU to finish earlier work."""
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def mask_all_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the micro-batch with all labels masked. A process computes it if it has no micro-batch left
    while other processes have one.
    """
    labels = torch.full_like(batch["labels"], IGNORED)
    no_answers: dict[str, Any] = {"sides": [], "answer_tokens": []} if "sides" in batch else {}
    return batch | {"labels": labels, "loss_positions": loss_positions(labels)} | no_answers


def _samples_of(sequences: Sequence[PackedSamples]) -> Iterator[int]:
    return (i for sequence in sequences for i in sequence)


def _labels(i: int, tokens: Tensor, samples: TokenizedDataset) -> Tensor:
    labels = tokens.masked_fill(_tensor(samples.loss_mask(i)) == 0, IGNORED)
    # In a packed sequence the first token would be predicted from the last token of the previous sample.
    labels[0] = IGNORED
    return labels


def _tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def _padded(tensors: Sequence[Tensor], length: int, value: int) -> Tensor:
    padded = torch.full((len(tensors), length), value, dtype=tensors[0].dtype)
    for row, tensor in zip(padded, tensors, strict=True):
        row[: len(tensor)] = tensor
    return padded


class Comparisons(NamedTuple):
    """The divisor of the summed losses of a step or a validation, and ORPO's token weight."""

    compared: int
    """Number of pairs or rated answers, by which summed losses are divided."""
    token_share: float
    """``compared`` divided by the number of trained tokens in good answers.

    ORPO multiplies the summed cross-entropy of the chosen answers by this value. Division by
    ``compared`` then gives the mean per token.
    """


def count_comparisons(answers: Sequence[int], samples: SidedDataset, *, pairs: bool) -> Comparisons:
    """Count the comparisons in some samples; with ``pairs``, two samples are one comparison."""
    compared = len(answers) // 2 if pairs else len(answers)
    good = [(i,) for i in answers if samples.side(i) == GOOD]
    return Comparisons(compared, compared / (sum_loss_weights(good, samples) or 1))


def collate_answers(
    sequences: Sequence[PackedSamples], samples: SidedDataset, shape: RowShape
) -> dict[str, Any]:
    """Collate a micro-batch (:func:`collate`) of answers that are compared.

    Returns:
        The tensors of the micro-batch, and two lists with an entry for each sample: ``sides``, ``GOOD`` or
            ``BAD``, and ``answer_tokens``, the number of tokens of the sample in the loss.
    """
    batch, members = collate(sequences, samples, shape), list(_samples_of(sequences))
    return batch | {
        "sides": [samples.side(i) for i in members],
        "answer_tokens": [sum(samples.loss_mask(i)[1:]) for i in members],
    }


def mismatched_samples(samples: SidedDataset, order: Sequence[int], max_length: int) -> SampleList:
    """Return each answer joined to the prompt of another sample, to estimate KTO's reference point.

    The divergence of the model from its base is estimated on answers that do not belong to their prompts
    (KTO's paper, section 4.1): sample ``k`` here is the prompt of ``order[k]`` with the answer of ``order[k -
    1]``, so that the answers of a step are used once each. An answer begins at the first trained token. A
    sample longer than ``max_length`` tokens loses the beginning of its prompt.
    """

    def parts(i: int) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens of the prompt, and the tokens and loss mask of the answer."""
        ids, mask = list(samples.token_ids(i)), list(samples.loss_mask(i))
        start = mask.index(1)
        return ids[:start], ids[start:], mask[start:]

    every = [parts(i) for i in order]
    mismatched = []
    for number, (prompt, _, _) in enumerate(every):
        _, answer, mask = every[number - 1]
        prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
        mismatched.append(Sample([*prompt, *answer], [0] * len(prompt) + mask))
    return SampleList(mismatched)


def mismatched_batches(
    samples: SidedDataset, order: Sequence[int], size: int, shape: RowShape
) -> list[dict[str, Any]]:
    """Return :func:`mismatched_samples` in micro-batches of ``size``, for KTO's reference point."""
    mismatched = mismatched_samples(samples, order, shape.max_length)
    batches = validation_batches(mismatched, size, shape)
    return [collate_answers(sequences, mismatched, shape) for sequences in batches]


class StepData(TypedDict):
    """The data of one optimizer step, for one process."""

    micro_batches: list[dict[str, Any]]
    loss_weight_sum: float
    """Sum of the loss weights of the whole step over all processes, which divides the summed loss."""
    tokens: int
    """Number of tokens of the whole step over all processes, without padding."""
    token_share: NotRequired[float]
    """Comparisons of a preference method divided by the number of trained tokens in good answers."""
    mismatched: NotRequired[list[dict[str, Any]]]
    """For KTO: this process's micro-batches of answers paired with other samples' prompts."""


class Steps:
    """The steps of a plan, collated; index ``n`` is step ``n + 1``."""

    def __init__(
        self,
        step_plan: StepPlan,
        samples: TokenizedDataset,
        shape: RowShape,
        *,
        micro_batch: int,
        compares: bool = False,
        pairs: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Collate this process's share of a plan.

        Args:
            micro_batch: sequences of a micro-batch.
            compares: whether ``samples`` are a ``SidedDataset``, for a preference method. The
                ``loss_weight_sum`` of a step is then the number of its pairs or rated answers.
            pairs: whether samples ``2k`` and ``2k + 1`` form a pair.
            rank: number of this process among ``world_size``, which share the micro-batches of a step.
        """
        self.step_plan = step_plan
        self._samples = samples
        self._shape = shape
        self._micro_batch = micro_batch
        self._compares = compares
        self._pairs = pairs
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return len(self.step_plan.steps)

    def __getitem__(self, n: int) -> StepData:
        sequences = self.step_plan.steps[n].sequences
        data = StepData(
            micro_batches=self._micro_batches(sequences),
            loss_weight_sum=sum_loss_weights(sequences, self._samples),
            tokens=count_tokens(sequences, self._samples),
        )
        if self._compares:
            samples, members = cast("SidedDataset", self._samples), list(_samples_of(sequences))
            comparisons = count_comparisons(members, samples, pairs=self._pairs)
            data["loss_weight_sum"], data["token_share"] = comparisons
            # If there is only one sample, no other prompt exists.
            mismatched = (
                []
                if self._pairs or len(members) < 2
                else mismatched_batches(samples, members, self._micro_batch, self._shape)
            )
            data["mismatched"] = mismatched[self._rank :: self._world_size]
        return data

    def _micro_batches(self, sequences: Sequence[PackedSamples]) -> list[dict[str, Any]]:
        """Collate this process's share of the micro-batches of a step."""
        groups = micro_batches(sequences, self._micro_batch)
        batches = [self.collate(group) for group in groups[self._rank :: self._world_size]]
        # Every process must run the same number of backward passes, because DDP reduces the gradients in
        # them.
        for _ in range(len(batches), math.ceil(len(groups) / self._world_size)):
            batches.append(mask_all_labels(self.collate(groups[0])))
        return batches

    def collate(self, sequences: Sequence[PackedSamples]) -> dict[str, Any]:
        """Collate the sequences of one micro-batch."""
        if self._compares:
            return collate_answers(sequences, cast("SidedDataset", self._samples), self._shape)
        return collate(sequences, self._samples, self._shape)
