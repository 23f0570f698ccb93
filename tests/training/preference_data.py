"""Preference data: for the tiny model, where answers that say "red" are better than "blue", and in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_pairs(file: Path, rows: int = 24) -> Path:
    """Write rows that each compare two answers of differing lengths."""
    lines = [
        {
            "prompt": f"what is {i}",
            "chosen": f"the red {'fox ' * (i % 4)}is {i}",
            "rejected": f"the blue {'dog ' * (i % 3)}was {i}",
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_rated(file: Path, rows: int = 24) -> Path:
    """Write rows that each rate one answer, good and bad in turn."""
    lines = [
        {
            "prompt": f"what is {i // 2}",
            "completion": f"the {'blue dog was' if i % 2 else 'red fox is'} {i // 2}",
            "label": i % 2 == 0,
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


class TokenLists:
    """Samples in memory: token ids, the first token of the answer, and the side of each."""

    def __init__(self, samples: Sequence[tuple[list[int], int, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def token_ids(self, i: int, /) -> Sequence[int]:
        return self.samples[i][0]

    def loss_mask(self, i: int, /) -> Sequence[int]:
        ids, start, _ = self.samples[i]
        return [int(place >= start) for place in range(len(ids))]

    def weights(self, i: int, /) -> None:
        pass

    def length(self, i: int, /) -> int:
        return len(self.samples[i][0])

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        return range(len(self))

    def side(self, i: int, /) -> int:
        return self.samples[i][2]

    def of_side(self, side: int, /) -> TokenLists:
        return TokenLists([sample for sample in self.samples if sample[2] == side])
