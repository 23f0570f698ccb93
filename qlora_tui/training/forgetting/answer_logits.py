"""Logits at the places of answers, several answers to a forward pass.

Where a run isolates packed samples, answers lie end to end in rows, as its training samples do. On a CPU all
rows have one length, for which oneDNN makes its kernels once: one answer at a time, each length costs it some
25 kernels, which take longer to make than the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training.batches import PackedSamples, pack

ROW_TOKENS = 384
"""Most tokens of a row, of which some 250 are of answers: as many as the chunked loss projects at a time."""


@dataclass(frozen=True)
class RowShape:
    """The shape of the rows in which a model reads answers."""

    packed: bool
    """Whether a row may hold several answers, which attend to themselves only."""
    max_length: int
    """Tokens of the run's own rows."""
    multiple: int = 1
    """Multiple of tokens that a row is padded to; where it is more than 1, all rows have one length."""
    pad_id: int = 0


@dataclass(frozen=True)
class PromptAndAnswer:
    """Token ids of a prompt with its answer."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def places(self) -> range:
        """Places whose next token is one of the answer."""
        return range(self.prompt_tokens - 1, len(self.ids) - 1)


def answer_logits(
    model: Any, answers: Sequence[PromptAndAnswer], shape: RowShape, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield each answer's number and its logits, in the order of the rows.

    Logits are (answer tokens, vocabulary) in the dtype of the head, at the places whose next token is one of
    the answer.
    """
    lengths = [len(answer.ids) for answer in answers]
    capacity = max(*lengths, min(shape.max_length, ROW_TOKENS)) if lengths else 0
    rows: list[PackedSamples] = (
        pack(range(len(answers)), lengths, capacity) if shape.packed else [(i,) for i in range(len(answers))]
    )
    length = -(-capacity // shape.multiple) * shape.multiple if shape.multiple > 1 and shape.packed else 0
    for row in rows:
        parts = [answers[i] for i in row]
        logits = _row_logits(model, parts, shape, length, device)
        start = 0
        for number, part in zip(row, parts, strict=True):
            yield number, logits[start : start + len(part.places)]
            start += len(part.places)


def _row_logits(
    model: Any, parts: Sequence[PromptAndAnswer], shape: RowShape, length: int, device: torch.device
) -> Tensor:
    """Logits at all answers of one row, (answer tokens and padding, vocabulary)."""
    ids = [token for part in parts for token in part.ids]
    lengths = [len(part.ids) for part in parts]
    more = max(0, length - len(ids))
    lengths[-1] += more
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    places = [start + place for start, part in zip(starts, parts, strict=True) for place in part.places]
    places += places[-1:] * (-len(places) % shape.multiple)
    settings: dict[str, Any] = {"use_cache": False}
    if shape.packed:
        positions = [place for each in lengths for place in range(each)]
        settings = {"segments": lengths, "position_ids": torch.tensor([positions], device=device)}
    logits: Tensor = model(
        input_ids=torch.tensor([ids + [shape.pad_id] * more], device=device),
        logits_to_keep=torch.tensor(places, device=device),
        **settings,
    ).logits
    return logits[0]
