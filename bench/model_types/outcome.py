"""Results of testing model types, as the docs store them. Imports no torch."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Verdict = Literal["trained", "refused", "wrong"]
VERDICTS: tuple[Verdict, ...] = ("trained", "refused", "wrong")


class Estimated(Struct, kw_only=True, omit_defaults=True):
    """Comparison of a model type's instant estimate with its traced step."""

    ratio: float = 0.0
    """Bytes of tensors in the traced step divided by bytes in the instant estimate."""
    uncertainty: float = 0.0
    """Share by which the estimate says that it may be off."""
    untraced: str = ""
    """Why there is no trace."""

    @property
    def is_outside(self) -> bool:
        """Return whether the traced step exceeds the range of the instant estimate."""
        return not self.untraced and self.ratio - 1 > self.uncertainty


class Walked(Struct, kw_only=True, omit_defaults=True):
    """Result for one model type."""

    model_type: str
    verdict: Verdict
    model_class: str = ""
    """The class of transformers that was trained."""
    reason: str = ""
    """Why it was refused, or what went wrong."""
    attention: str = ""
    loss: str = ""
    replaced: tuple[str, ...] = ()
    """Fast code paths that the check of the first step replaced."""
    chat: str = ""
    """How answers are computed, if not with a cache of keys and values."""
    merge: str = ""
    """Why the adapter was not merged."""
    largest_difference: float = 0.0
    """Largest difference of loss or gradient norm from the plain loop."""
    estimate: Estimated | None = None
    """Comparison of the memory estimate; None if it was not compared."""

    @property
    def is_wrong(self) -> bool:
        """Return whether results differ from the libraries', or memory exceeds the estimate's range."""
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
    """Results for all model types."""

    transformers: str
    """Version of transformers."""
    types: list[Walked]
    """Results in alphabetical order."""
