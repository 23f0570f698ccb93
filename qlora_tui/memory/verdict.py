"""Comparison of an estimate with the available memory, including its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory.estimate import Estimate

TIGHT_SHARE = 0.05
"""Share of the memory; if less remains, the fit is tight: another process or a longer row ends the run."""


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
    def fits(self) -> bool:
        """Return whether it fits for certain, including tightly."""
        return self.word in ("fits", "tight")


def check_fit(estimated: Estimate, available_bytes: int) -> Verdict:
    """Return the verdict: ``fits`` only if even the upper end of the range does."""
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
