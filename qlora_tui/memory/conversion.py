"""What converting a GGUF file takes, in the process of its own that does it before the first run.

It is compared with a run's peak and never added to it: the conversion is over, and its process gone, before
the trainer loads anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.formatting import MIB, format_bytes

Way = Literal["plain", "streamed", "whole"]
"""How the file is converted: all of it by this program; tokenizer and configuration by transformers; or all
of it by transformers, with every weight at once."""
PLAIN_BYTES = 50 * MIB
"""Python, numpy, tokenizers, and a block of rows in float32."""
PLAIN_BYTES_A_TOKEN = 4000
"""Of the vocabulary: lists of its words and merges in Python, and the tokenizer made from them."""
LIBRARIES_BYTES = 320 * MIB
"""The same with torch and transformers."""
BYTES_A_TOKEN = 2000
"""Of the vocabulary, by transformers."""
BYTES_A_WEIGHT = 8
"""Of all weights at once: as float32, and in a copy of it."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that has yet to be done."""

    file: str
    """Name of the GGUF file."""
    peak_bytes: int
    """Largest resident set of its process."""

    def words(self, run_bytes: int | None) -> str:
        """One sentence. ``run_bytes``: the peak of a run on the CPU, with which the conversion's is compared;
        None for a run on a card, which it takes nothing of."""
        beside = "of the machine's memory"
        if run_bytes is not None:
            beside = "more than the run" if self.peak_bytes > run_bytes else "less than the run"
        return (
            f"Before the first run {self.file} is converted in a separate process: "
            f"{format_bytes(self.peak_bytes)}, {beside}."
        )


def peak_bytes(way: Way, *, file_bytes: int, vocabulary: int, weights: int) -> int:
    """Largest resident set of the process. The whole GGUF file is mapped, and counts as it is read.

    Measured: 329 MiB for SmolLM2 135M in Q4_1 (plain), 995 for Gemma 3 270M in Q4_K_M (streamed), 3,161 for
    the same file at once.
    """
    if way == "plain":
        return PLAIN_BYTES + file_bytes + vocabulary * PLAIN_BYTES_A_TOKEN
    rest = LIBRARIES_BYTES + file_bytes + vocabulary * BYTES_A_TOKEN
    return rest + (weights * BYTES_A_WEIGHT if way == "whole" else 0)
