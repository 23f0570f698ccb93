"""What came of walking the types of models, as the docs keep it. Imports no torch."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Verdict = Literal["trained", "refused", "wrong"]
VERDICTS: tuple[Verdict, ...] = ("trained", "refused", "wrong")


class Estimated(Struct, kw_only=True, omit_defaults=True):
    """How the instant estimate of a type compares with its traced step."""

    ratio: float = 0.0
    """Bytes of the traced step's tensors, as a share of the instant estimate's."""
    uncertainty: float = 0.0
    """Share by which that estimate says that it may be off."""
    untraced: str = ""
    """Why there is no trace."""

    @property
    def is_outside(self) -> bool:
        """Return whether the traced step takes more than the range of the instant estimate has."""
        return not self.untraced and self.ratio - 1 > self.uncertainty


class Walked(Struct, kw_only=True, omit_defaults=True):
    """What came of one type."""

    model_type: str
    verdict: Verdict
    model_class: str = ""
    """The class of transformers that was trained."""
    reason: str = ""
    """Why it was refused, or what went wrong."""
    attention: str = ""
    loss: str = ""
    replaced: tuple[str, ...] = ()
    """Faster parts that the check of the first step took out."""
    chat: str = ""
    """How answers are computed, if not with a cache of keys and values."""
    merge: str = ""
    """Why its adapter is not merged."""
    largest_difference: float = 0.0
    """Of loss or gradient norm from the plain loop's."""
    estimate: Estimated | None = None
    """What came of its memory estimate; None where it was not compared."""

    @property
    def is_wrong(self) -> bool:
        """Return whether it computes other than the libraries, or takes more memory than its range has."""
        return self.verdict == "wrong" or (self.estimate is not None and self.estimate.is_outside)

    @property
    def how(self) -> str:
        """Return what it is computed with, or why it is not trained."""
        if self.verdict != "trained":
            return self.reason
        parts = [] if self.replaced or "padded" in self.attention or "stock" in self.loss else ["fast"]
        if "padded" in self.attention:
            parts.append("padded")
        if "stock" in self.loss:
            parts.append("stock loss")
        parts += [f"stock in place of {part}" for part in self.replaced]
        if self.chat:
            parts.append(f"chat {self.chat}")
        if self.merge:
            parts.append(f"not merged: {self.merge}")
        return ", ".join(parts)


class Outcome(Struct, kw_only=True):
    """What came of all types."""

    transformers: str
    """Its version."""
    types: list[Walked]
    """In alphabetical order."""
