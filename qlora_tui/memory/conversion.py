"""Memory of converting a GGUF file, in a separate process before the first run.

It is compared with a run's peak and never added to it: the conversion process ends before the trainer loads
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.formatting import MIB, format_bytes

Way = Literal["plain", "streamed"]
"""How the file is converted: all of it by this program (plain), or tokenizer and config by transformers
(streamed)."""
PLAIN_BYTES = 50 * MIB
"""Python, numpy, tokenizers, and a block of rows in float32."""
PLAIN_BYTES_PER_TOKEN = 4000
"""Bytes per vocabulary token: Python lists of words and merges, and the tokenizer built from them."""
LIBRARIES_BYTES = 320 * MIB
"""Bytes of the libraries with torch and transformers."""
BYTES_PER_TOKEN = 2000
"""Bytes per vocabulary token in transformers."""


@dataclass(frozen=True)
class Conversion:
    """A pending conversion."""

    file: str
    """Name of the GGUF file."""
    peak_bytes: int
    """Largest resident set of the conversion process."""

    def words(self, run_bytes: int | None) -> str:
        """Return one sentence. ``run_bytes`` is the peak of a run on the CPU, with which the conversion's is
        compared; None for a run on a GPU, whose memory it does not use."""
        beside = "of the machine's memory"
        if run_bytes is not None:
            beside = "more than the run" if self.peak_bytes > run_bytes else "less than the run"
        return (
            f"Before the first run {self.file} is converted in a separate process: "
            f"{format_bytes(self.peak_bytes)}, {beside}."
        )


def peak_bytes(way: Way, *, file_bytes: int, vocabulary: int) -> int:
    """Return the largest resident set. The whole GGUF file is mapped, and counts as it is read.

    Measured: 329 MiB for SmolLM2 135M in Q4_1 (plain), 995 for Gemma 3 270M in Q4_K_M (streamed).
    """
    if way == "plain":
        return PLAIN_BYTES + file_bytes + vocabulary * PLAIN_BYTES_PER_TOKEN
    return LIBRARIES_BYTES + file_bytes + vocabulary * BYTES_PER_TOKEN
