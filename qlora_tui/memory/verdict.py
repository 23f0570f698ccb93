"""Does it fit: an estimate against the memory there is, with its doubt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_tui.memory.estimate import Estimate

TIGHT_SHARE = 0.05
"""Less than this share of the memory left over is tight: another process or a longer row ends the run."""


@dataclass(frozen=True)
class Verdict:
    """One word, and what it rests on."""

    word: Literal["fits", "tight", "does not fit", "uncertain"]
    needed_bytes: int
    low_bytes: int
    high_bytes: int
    available_bytes: int
    reason: str
    """Why the band of doubt is as wide as it is."""

    @property
    def spare_bytes(self) -> int:
        """Left over; negative where it does not fit."""
        return self.available_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Fits for certain, if only just."""
        return self.word in ("fits", "tight")


def check_fit(estimated: Estimate, available_bytes: int) -> Verdict:
    """``fits`` only when even the upper end of the band does."""
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
