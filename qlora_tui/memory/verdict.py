"""Comparison of an estimate with the available memory, including its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory.estimate import Estimate

TIGHT_SHARE = 0.05
"""Margin of a fit that is not tight, as a share of the memory: with less left, another process or a longer
sequence can end the run."""


@dataclass(frozen=True)
class Verdict:
    """The verdict in one word, and its basis."""

    word: Literal["fits", "tight", "does not fit", "uncertain"]
    needed_bytes: int
    low_bytes: int
    high_bytes: int
    available_bytes: int
    reason: str
    """Reason for the width of the uncertainty range."""

    @property
    def spare_bytes(self) -> int:
        """Return the bytes left over; negative where it does not fit."""
        return self.available_bytes - self.needed_bytes

    @property
    def fits_even_if_tight(self) -> bool:
        """Return whether the upper end of the range fits, with or without a margin."""
        return self.word in ("fits", "tight")

    @property
    def fits_with_margin(self) -> bool:
        """Return whether the upper end of the range leaves 5 % of the memory free (``TIGHT_SHARE``)."""
        return self.word == "fits"


def check_fit(estimated: Estimate, available_bytes: int) -> Verdict:
    """Compare an estimate's range with the memory.

    ``fits`` means that even the upper end of the range leaves 5 % of the memory free; ``tight``, that it
    leaves less; ``uncertain``, that only the lower end fits.
    """
    band = estimated.band
    word: Literal["fits", "tight", "does not fit", "uncertain"]
    if band.low_bytes > available_bytes:
        word = "does not fit"
    elif band.high_bytes > available_bytes:
        word = "uncertain"
    elif band.high_bytes > available_bytes * (1 - TIGHT_SHARE):
        word = "tight"
    else:
        word = "fits"
    return Verdict(
        word, estimated.process_bytes, band.low_bytes, band.high_bytes, available_bytes, band.reason
    )
